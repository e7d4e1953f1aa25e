"""Datasets: spans, columns and their names, values as cells."""

from __future__ import annotations

import csv
import math
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dataflows import dataset as datasets
from dataflows.dataset import Row, Skew, Span, columns_of, digest, write_dataset
from dataflows.job import JobError

START = datetime(2026, 3, 1, tzinfo=UTC)


class Shade(str, Enum):  # noqa: UP042 - StrEnum shows itself otherwise
    red = "red"


def row(id: int = 1, label: Any = True, prediction: Any = 0.5, names: Any = None, **features: Any) -> Row:
    """A row with these features."""
    features = dict(names or features)
    return Row(id, START, features, prediction, "M", id, False, label, START if label is not None else None, False)


class Fake:
    """Rows without a run."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

        class Job:
            feature_names = ("a", "label")

        self.job = Job()

    def rows(self) -> Any:
        """As those of a dataset."""
        return enumerate(self._rows)


def written(path: Path, *rows: Row) -> dict[str, list[Any]]:
    """What a parquet file of these rows holds."""
    write_dataset(Fake(list(rows)), path / "x.parquet")  # type: ignore[arg-type]
    assert [file.name for file in path.iterdir()] == ["x.parquet"]
    found: dict[str, list[Any]] = parquet.read_table(path / "x.parquet").to_pydict()
    return found


def test_a_span_has_its_begin_and_not_its_end() -> None:
    """Dates, times with and without zones; no bound at `start` and `end`; what is no time is said."""
    span = Span.of("2026-03-01", "2026-03-02T01:00:00+01:00")
    day = 86_400_000_000
    assert span.begin is not None
    assert [span.holds(span.begin + more) for more in (-1, 0, day - 1, day)] == [False, True, True, False]
    assert Span.of("start", "end") == (None, None)
    assert Span.of("0001-01-01", "9999-12-31").holds(0)
    for words in (("now", "end"), ("start", ""), ("end", "end"), ("start", "start"), ("7", "end")):
        with pytest.raises(JobError, match="nor an event time"):
            Span.of(*words)


def test_features_named_as_other_columns_get_a_name_of_their_own() -> None:
    """Also where that name is a feature's, or another's made so; nothing is lost, and the order stays."""
    flat = columns_of(row(label=7, names={"id": 1, "label": 2, "feature_label": 3, "x": 4, "time": 5}))
    assert list(flat) == ["id", "time", "feature_id", "feature_feature_label", "feature_label", "x", "feature_time",
                          "prediction", "model", "version", "late", "label", "label_time", "assumed"]  # fmt: skip
    assert [flat[name] for name in list(flat)[2:7]] == [1, 2, 3, 4, 5]
    assert flat["label"] == 7


@given(st.sets(st.sampled_from(["id", "label", "feature_label", "feature_feature_label", "x", "model", "feature_id"])))
def test_whatever_features_are_called_each_has_a_column(names: set[str]) -> None:
    """As many columns as there are features, beside those that all rows have."""
    assert len(columns_of(row(names=dict.fromkeys(names, 1)))) == len(names) + 9


@pytest.mark.parametrize(("values", "expected"), [
    ([1, None, 2], [1, None, 2]),
    ([1, 0.5], [1.0, 0.5]),
    ([True, None], [True, None]),
    ([True, 0.5], ["True", "0.5"]),
    ([1, "a", None], ["1", "a", None]),
    ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
    ([2**63, 1], [str(2**63), "1"]),
    ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"]),
    ([2**53, 0.5], [2.0**53, 0.5]),
    ([None, None], [None, None]),
    ([0.1 + 0.2, -0.0, 5e-324], [0.1 + 0.2, -0.0, 5e-324]),
    ([START, None], [START, None]),
    ([{"a": 0.5, "b": None}, {}], ['{"a":0.5,"b":null}', "{}"]),
    ([{True: 0.25, 3: 1}], ['{"True":0.25,"3":1}']),
    ([Shade.red, "blue"], ["red", "blue"]),
    ([np.float64(0.1), 1], [0.1, 1.0]),
    ([np.int64(3), np.bool_(True)], ["3", "True"]),
    (["ü\n\",;", ""], ["ü\n\",;", ""]),
])  # fmt: skip
def test_a_column_has_the_narrowest_type_that_holds_all(tmp_path: Path, values: list[Any], expected: list[Any]) -> None:
    """Integers, floats, bools, times, text; no value is rounded, and what has several types becomes text."""
    found = written(tmp_path, *[row(number, a=value) for number, value in enumerate(values)])["a"]
    found = [value.astimezone(UTC) if isinstance(value, datetime) else value for value in found]
    assert list(map(repr, found)) == list(map(repr, expected))


def test_infinities_and_nan_are_kept(tmp_path: Path) -> None:
    """Parquet has them."""
    found = written(tmp_path, row(a=math.nan), row(a=math.inf), row(a=1))["a"]
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, 1.0]


def test_rows_of_several_sets_of_features_have_all_columns(tmp_path: Path) -> None:
    """In the order in which they came up, before the columns that all have; csv and parquet alike."""
    rows = [row(1, a=1), row(2, b=0.5, a=2), row(3, c="x")]
    table = written(tmp_path, *rows)
    assert list(table)[:6] == ["id", "time", "a", "b", "c", "prediction"]
    assert [table[name] for name in "abc"] == [[1, 2, None], [None, 0.5, None], [None, None, "x"]]
    write_dataset(Fake(rows), tmp_path / "x.csv")  # type: ignore[arg-type]
    with (tmp_path / "x.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [(cell["a"], cell["b"], cell["c"]) for cell in cells] == [("1", "", ""), ("2", "0.5", ""), ("", "", "x")]


def test_no_rows_have_the_columns_of_the_job(tmp_path: Path) -> None:
    """What reads the file finds the columns it knows."""
    table = written(tmp_path)
    assert list(table)[:4] == ["id", "time", "a", "feature_label"]
    assert set(map(len, table.values())) == {0}


@pytest.mark.parametrize("suffix", datasets.FORMATS)
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    """When reading fails half way, what was there before is there still, and nothing beside it."""
    path = tmp_path / f"x{suffix}"
    path.write_text("before")

    class Failing(Fake):
        calls = 0

        def rows(self) -> Any:
            self.calls += 1
            yield 1, row(a=1)
            if self.calls == 2 or suffix == ".jsonl":
                raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_dataset(Failing([]), path)  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_a_file_is_asked_for_in_a_known_format(tmp_path: Path) -> None:
    """Other suffixes and directories are refused; directories on the way are made."""
    (tmp_path / "d.csv").mkdir()
    for name in ("x.txt", "x", "x.CSV", "d.csv"):
        with pytest.raises(JobError, match=r"a dataset is one of|is a directory"):
            write_dataset(Fake([]), tmp_path / name)  # type: ignore[arg-type]
    found = write_dataset(Fake([row(a=1), row(2, label=None)]), tmp_path / "a" / "b" / "x.jsonl")  # type: ignore[arg-type]
    assert (sorted(found[0]), found[1:]) == ([0, 1], (2, 1))


def test_digests_tell_apart_what_looks_alike() -> None:
    """The last bit of a float, 1 and True and 1.0, 0.0 and -0.0, None and a feature that is not there."""
    rows = [row(a=1), row(a=True), row(a=1.0), row(a=0.0), row(a=-0.0), row(a=0.1), row(a=math.nextafter(0.1, 1)),
            row(a=None), row(), row(a="1"), row(a=1, label=False), row(a=1, label=None), row(a=1, prediction=0.25)]  # fmt: skip # noqa: E501
    assert len({digest(each) for each in rows}) == len(rows)
    assert digest(row(a=math.nan)) == digest(row(a=math.nan))


def test_only_what_differs_is_skew() -> None:
    """Rows that cannot be compared, or are not kept, are told and are no skew."""
    assert Skew(rows=3, equal=2, unchecked=1, not_kept=5).none
    for name in ("others", "only_logged", "only_computed"):
        skew = Skew(rows=3, equal=2)
        setattr(skew, name, 1)
        assert not skew.none
