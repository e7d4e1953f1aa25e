"""The table of aggregates and windows in the documentation is what the code does."""

from __future__ import annotations

from features import Hopping, Last, Lifetime, Session, Sliding, Tiled, Tumbling, windows

from .streams import AGGREGATES


def test_the_table_is_what_the_code_accepts() -> None:
    """Every cell of the module's table equals the code's answer, and every aggregate has its row."""
    assert windows.__doc__ is not None
    rows = [line.strip(" |").split("|") for line in windows.__doc__.splitlines() if line.strip().startswith("|")]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    table = {row[0]: dict(zip(head[1:-1], row[1:-1], strict=True)) for row in body}
    columns = {
        "Sliding": Sliding("1d"),
        "Last": Last(10),
        "Tumbling": Tumbling("1h"),
        "Hopping": Hopping("1h", hop="5m"),
        "Session": Session(gap="30m"),
        "Tiled": Tiled("30d", resolution="1h"),
        "Lifetime": Lifetime(),
    }
    code = {
        type(aggregate).__name__.removesuffix("Value"): {
            name: "yes" if windows.refusal(aggregate, over) is None else "no" for name, over in columns.items()
        }
        for aggregate in AGGREGATES
    }
    assert table == code
