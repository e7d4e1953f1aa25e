"""Static tables from CSV, Parquet and dicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from features import Lookup


@pytest.fixture
def shops(tmp_path: Path) -> Path:
    """A small table."""
    path = tmp_path / "shops.csv"
    path.write_text("terminal_id,region,rent,share\n1,north,900,0.5\n2,,0,\n", encoding="utf-8")
    return path


def test_csv_values_are_parsed_and_keys_compared_as_text(shops: Path) -> None:
    """The int 1 and the text "1" find the row of 1; empty cells are None and 0 is 0."""
    table = Lookup(shops, key="terminal_id", fields=["region", "rent", "share"], default="?").load()
    assert table.get(1) == table.get("1") == ("north", 900, 0.5)
    assert table.get(2) == (None, 0, None)
    assert table.get(3) == ("?", "?", "?")
    assert len(table) == 2


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    """A Parquet file keeps its own types."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"terminal_id": [1, 2], "rent": [900, 0]}), tmp_path / "shops.parquet")
    table = Lookup(tmp_path / "shops.parquet", key="terminal_id", fields=["rent"]).load()
    assert (table.get("1"), table.get(2)) == ((900,), (0,))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error carries the command."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        Lookup(tmp_path / "shops.parquet", key="k", fields=["x"]).load()


def test_a_missing_column_is_named(shops: Path) -> None:
    """The error shows what is missing and what there is."""
    with pytest.raises(ValueError, match=r"no column 'city'.*'region'"):
        Lookup(shops, key="terminal_id", fields=["city"]).load()
    with pytest.raises(ValueError, match="no column 'shop'"):
        Lookup(shops, key="shop", fields=["rent"]).load()


def test_a_key_that_comes_twice_is_an_error(shops: Path) -> None:
    """The error shows the key and the line."""
    with shops.open("a", encoding="utf-8") as file:
        file.write("1,south,1,1\n")
    with pytest.raises(ValueError, match=r"shops\.csv:4: key '1'"):
        Lookup(shops, key="terminal_id", fields=["rent"]).load()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A table that is not there is noticed when it is loaded."""
    with pytest.raises(FileNotFoundError):
        Lookup(tmp_path / "none.csv", key="k", fields=["x"]).load()
