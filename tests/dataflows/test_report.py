"""The report: tables and pictures of metrics, with whatever rows a job may hand over."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dataflows.report import _figure, metric_table, plot_metrics

NAN = math.nan
DAY_US = 86_400_000_000
Row = dict[str, Any]


def _row(day: int, outcomes: int, **values: float | None) -> Row:
    return {"time": day * DAY_US, "outcomes": outcomes, "values": values}


ROWS = [
    _row(20_458, 100, ROCAUC=0.5, ROCAUC_rolling_1000=0.5, LogLoss=0.7),
    _row(20_459, 2_000, ROCAUC=None, ROCAUC_rolling_1000=0.0, LogLoss=0.3),
    _row(20_460, 58_408, ROCAUC=0.875, ROCAUC_rolling_1000=0.9, LogLoss=NAN),
]


def _printed(rows: list[Row], **arguments: int) -> str:
    file = io.StringIO()
    Console(file=file, width=140).print(metric_table(rows, **arguments))
    return file.getvalue()


def _plot(rows: list[Row], directory: Path, title: str = "Payments") -> tuple[Path, str]:
    png, page = directory / "new" / "metrics.png", directory / "new" / "metrics.html"
    plot_metrics(rows, png, page, title)
    return png, page.read_text("utf-8")


class _Page(HTMLParser):
    """Collects the tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        self.loads += [value or "" for name, value in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_table_shows_each_metric_at_each_time() -> None:
    """Times, outcomes and values stand in the table, a rolling metric under a readable heading."""
    text = _printed(ROWS)
    for shown in ("ROCAUC last 1,000", "58,408", "0.8750", "0.0000", "2026-01-05 00:00:00", "–"):
        assert shown in text


def test_a_long_table_keeps_its_last_row() -> None:
    """Rows beyond the limit are thinned out evenly; the newest is always there, and the table says so."""
    rows = [_row(20_000 + n, n, MAE=n / 1000) for n in range(1, 501)]
    table = metric_table(rows, limit=5)
    assert table.row_count == 5
    assert "0.5000" in _printed(rows, limit=5)
    assert "5 of 500 rows" in _printed(rows, limit=5)


def test_iso_text_and_microseconds_are_the_same_time() -> None:
    """A time given as ISO text prints as the same time in microseconds; rows are put in the order of time."""
    iso = {"time": "2026-01-05T00:00:00Z", "outcomes": 100, "values": ROWS[0]["values"]}
    assert _printed([iso, *ROWS[1:]]) == _printed(ROWS)
    assert _printed(ROWS[::-1]) == _printed(ROWS)


def test_markup_in_names_is_text() -> None:
    """A metric called like terminal markup is shown as it is called."""
    assert "[red]x[/nothing]" in _printed([_row(1, 1, **{"[red]x[/nothing]": 1.0})])


def test_cumulative_and_rolling_share_a_panel() -> None:
    """There is one panel per metric, with one line since the start and one per rolling length."""
    rows = [_row(1, 10, MAE_rolling_100=0.4, RMSE=1.0, MAE=0.5, MAE_rolling_10=0.3)]
    panels = {ax.get_title(loc="left"): ax for ax in _figure(rows, "t").axes}
    assert list(panels) == ["MAE", "RMSE"]
    labels = [text.get_text() for text in panels["MAE"].get_legend().get_texts()]
    assert labels == ["since the start: 0.5000", "last 10: 0.3000", "last 100: 0.4000"]


def test_a_missing_value_is_a_gap() -> None:
    """None, NaN and infinities interrupt a line; a value between two gaps is a dot."""
    values = [0.1, None, 0.0, NAN, 0.3, 0.4, math.inf]
    rows = [_row(n, 10 * n + 10, MAE=v) for n, v in enumerate(values)]
    line = _figure(rows, "t").axes[0].get_lines()[0]
    drawn = [None if math.isnan(y) else y for y in line.get_ydata()]
    assert drawn == [0.1, None, 0.0, None, 0.3, 0.4, None]
    assert line.get_markevery() == [0, 2]


def test_the_first_outcomes_do_not_flatten_the_rest() -> None:
    """A wild start leaves the panel instead of stretching its axis."""
    rows = [_row(n, n * 100, LogLoss=1000.0 if n == 1 else 0.05 + n / 10_000) for n in range(1, 101)]
    low, high = _figure(rows, "t").axes[0].get_ylim()
    assert 0 < low < 0.06
    assert high < 0.07


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        [_row(1, 0, MAE=None)],
        [_row(1, 0)],
        [_row(1, 5, MAE=0.0), _row(1, 6, MAE=0.0)],
        [_row(1, 5, MAE=1.0), _row(2, 6, RMSE=2.0)],
        [_row(0, 5, MAE=-1e300), _row(40_000, 6, MAE=1e300)],
    ],
    ids=["empty", "one row", "no value", "no metric", "equal times", "changing metrics", "extremes"],
)
def test_whatever_the_rows_there_is_a_picture_and_a_page(rows: list[Row], tmp_path: Path) -> None:
    """Few, missing or odd rows give a picture of the right size and a page, without a warning."""
    png, page = _plot(rows, tmp_path)
    header = png.read_bytes()[:24]  # the signature, then a chunk that begins with the width
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1600
    assert page.rstrip().endswith("</html>")
    _printed(rows)


@settings(max_examples=15)
@given(
    st.lists(
        st.builds(
            _row,
            st.integers(0, 30_000),
            st.integers(0, 10**9),
            MAE=st.none() | st.floats(),
            MAE_rolling_10=st.none() | st.floats(-1, 1),
        ),
        max_size=6,
    )
)
def test_any_values_can_be_drawn(rows: list[Row]) -> None:
    """No combination of numbers, gaps and times makes the table or the figure fail."""
    _printed(rows)
    _figure(rows, "t").canvas.draw()


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """The page has no script, loads no address, forbids both, and its picture is well-formed."""
    _, text = _plot(ROWS, tmp_path)
    page = _Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("#") for address in page.loads)
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text
    svg = text[text.index("<svg") : text.index("</svg>") + len("</svg>")]
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "<?xml" not in text
    assert "0.8750" in page.words


def test_names_and_titles_are_escaped(tmp_path: Path) -> None:
    """A title or metric name that looks like HTML or a formula is shown, not interpreted."""
    evil = "<script>alert('1')</script> & \"$x^2\" {0}"
    _, text = _plot([_row(1, 1, **{evil: 1.0})], tmp_path, evil)
    page = _Page(text)
    assert "script" not in page.tags
    assert evil in page.words


def test_drawing_leaves_no_trace_in_matplotlib(tmp_path: Path) -> None:
    """The user's own matplotlib settings are the same afterwards, and no figure stays open."""
    before = dict(matplotlib.rcParams)
    _plot(ROWS, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    """Neither time nor chance goes into the picture or the page."""
    first_png, first = _plot(ROWS, tmp_path / "a")
    second_png, second = _plot(ROWS, tmp_path / "b")
    assert first_png.read_bytes() == second_png.read_bytes()
    assert first == second


def test_text_that_is_no_time_is_refused() -> None:
    """The error shows the text that could not be read as a time."""
    with pytest.raises(ValueError, match="yesterday"):
        metric_table([{"time": "yesterday", "outcomes": 1, "values": {}}])
