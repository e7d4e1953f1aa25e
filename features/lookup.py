"""Features from a static table, looked up by a key of the event: CSV, Parquet, or a dict."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import field_validator

from features.declaration import Declaration

Row = Mapping[str, Any]


class LookupTable:
    """A loaded table: rows of values by key. Keys are compared as text, so that a CSV's 12 is found by the int 12."""

    __slots__ = ("_nothing", "_rows")

    def __init__(self, rows: dict[str, tuple[Any, ...]], nothing: tuple[Any, ...]) -> None:
        self._rows = rows
        self._nothing = nothing

    def get(self, key: object) -> tuple[Any, ...]:
        """The values of the declared fields for a key; the default in each where the table has no such key."""
        return self._rows.get(str(key), self._nothing)

    def __len__(self) -> int:
        return len(self._rows)


class Lookup(Declaration):
    """Fields of a static table, found by a field of the event.

    `table` is the path of a CSV file (with a header) or a Parquet file that has a column named as `key`, or a dict of
    key to row, a row being a dict by field. `default` stands in every field where the table lacks the key. In a CSV
    numbers are read as int or float, empty cells as None.

    >>> shops = Lookup({"t-1": {"region": "north", "rent": 900}}, key="terminal_id", fields=["region", "rent"])
    >>> shops.feature_names
    ('region_by_terminal_id', 'rent_by_terminal_id')
    >>> table = shops.load()
    >>> table.get("t-1"), table.get("t-2")
    (('north', 900), (None, None))
    """

    table: Path | dict[Any, dict[str, Any]]
    key: str
    columns: tuple[str, ...]
    default: Any = None

    def __init__(
        self,
        table: str | Path | Mapping[Any, Row],
        key: str,
        fields: Sequence[str],
        default: Any = None,
    ) -> None:
        rows = {each: dict(row) for each, row in table.items()} if isinstance(table, Mapping) else Path(table)
        super().__init__(table=rows, key=key, columns=tuple(fields), default=default)

    @field_validator("columns")
    @classmethod
    def _distinct(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if not columns or len(set(columns)) < len(columns):
            raise ValueError(f"fields must name one or more columns of the table, each once, not {list(columns)!r}")
        return columns

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names in the order of the values of `LookupTable.get`."""
        return tuple(f"{column}_by_{self.key}" for column in self.columns)

    def load(self) -> LookupTable:
        """Read the table.

        Raises FileNotFoundError, or ValueError where a column is missing or a key comes twice, ImportError where
        Parquet is asked for and pyarrow is not installed.
        """
        rows: dict[str, tuple[Any, ...]] = {}
        for place, key, row in self._read():
            if key in rows:
                raise ValueError(f"{place}: key {key!r} of column {self.key!r} comes twice. Hint: one row per key")
            missing = [column for column in self.columns if column not in row]
            if missing:
                raise ValueError(f"{place} has no {missing}. It has {sorted(row)}")
            rows[key] = tuple(row[column] for column in self.columns)
        return LookupTable(rows, (self.default,) * len(self.columns))

    def _read(self) -> Iterator[tuple[str, str, Row]]:
        """Each row, after where it stands and its key as text."""
        if isinstance(self.table, dict):
            for key, row in self.table.items():
                yield f"lookup row {key!r}", str(key), row
        elif self.table.suffix.lower() in (".parquet", ".pq"):
            columns, table_rows = _read_parquet(self.table)
            self._check_columns(columns)
            for number, row in enumerate(table_rows):
                yield f"{self.table}, row {number}", str(row[self.key]), row
        else:
            yield from self._read_csv(self.table)

    def _read_csv(self, path: Path) -> Iterator[tuple[str, str, Row]]:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            self._check_columns(reader.fieldnames or ())
            for row in reader:
                values = {column: _parse(row[column]) for column in self.columns}
                yield f"{path}:{reader.line_num}", row[self.key], values

    def _check_columns(self, columns: Iterable[str]) -> None:
        present = list(columns)
        missing = [column for column in (self.key, *self.columns) if column not in present]
        if missing:
            raise ValueError(f"{self.table} has no column {', '.join(map(repr, missing))}. It has {present}")


_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(?P<fraction>\.[0-9]+)?(?P<exponent>[eE][+-]?[0-9]+)?")


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"cannot read {path} without pyarrow. Hint: pip install pyarrow") from error
    table = parquet.read_table(path)
    return table.column_names, table.to_pylist()


def _parse(cell: str) -> int | float | str | None:
    """A CSV's cell: int or float where it reads as one, None where it is empty, else the text.

    Codes stay text ("007"), and so does what is no finite number ("nan", "1e999"): it would poison sums and models.

    >>> [_parse(cell) for cell in ("12", "-1.5e3", "", "north", "1_000", "007", " 12 ", "nan", "1e999")]
    [12, -1500.0, None, 'north', '1_000', '007', ' 12 ', 'nan', '1e999']
    """
    if cell == "":
        return None
    number = _NUMBER.fullmatch(cell)
    if number is None:
        return cell
    if number.group("fraction") is None and number.group("exponent") is None:
        return int(cell)
    value = float(cell)
    return value if isfinite(value) else cell
