"""How a job's metrics came along over event time: as a table in the terminal, as a picture, as a page.

A row is what the job knew at one moment: `{"time": …, "outcomes": …, "values": {name: value}}`, the time as
ISO text or integer microseconds, the outcomes counted since the start. A metric over the last N outcomes is
named `NAME_rolling_N` and shares a panel with `NAME`. A value that is None or not finite is a gap.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dataflows.events import to_datetime, to_time_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

TERMINAL_ROWS = 12
PAGE_ROWS = 200
PLOT_ROWS = 4_000
"""More rows than this are thinned out evenly, the last one kept: nobody sees more, and pages stay small."""

NOISY_SHARE = 0.02
"""The first outcomes move every metric wildly; this share of them does not stretch the vertical axis."""

DRAWABLE = 1e150
"""Beyond this the arithmetic of axes overflows: such a value is a number in tables and a gap in pictures."""

MISSING = "–"
ROLLING = re.compile(r"(?P<metric>.+)_rolling_(?P<count>\d+)", re.DOTALL)

INK, QUIET, GRID = "#1f2933", "#6b7780", "#e6e9ec"
LINES = ("#1f5fa8", "#e07b24", "#2a9d78", "#8c5fb0")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "svg.fonttype": "path",
    "svg.hashsalt": "millrace",  # the same rows give the same bytes
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel: its values, NaN where there is a gap; `last` is N of a rolling metric or None."""

    values: tuple[float, ...]
    last: int | None = None

    @property
    def label(self) -> str:
        """What the line covers, and where it ends.

        >>> Series((0.5, 0.75), last=1000).label
        'last 1,000: 0.7500'
        """
        over = "since the start" if self.last is None else f"last {self.last:,}"
        known = [value for value in self.values if not math.isnan(value)]
        return f"{over}: {number_text(known[-1])}" if known else over


def metric_table(rows: Iterable[Row], limit: int = TERMINAL_ROWS) -> Table:
    """A table of the metrics over event time, at most `limit` rows spread evenly, the last one always shown.

    >>> table = metric_table([{"time": 0, "outcomes": 10, "values": {"MAE": 0.5}}])
    >>> [column.header.plain for column in table.columns]
    ['event time (UTC)', 'outcomes', 'MAE']
    """
    ordered = _in_order(rows)
    shown = _thin(ordered, limit)
    names = _names(ordered)
    table = Table(caption=_caption(ordered, shown), caption_justify="left")
    table.add_column(Text("event time (UTC)"), no_wrap=True)
    for heading in ("outcomes", *map(metric_heading, names)):
        # Text, not str: a name with [brackets] is no markup.
        table.add_column(Text(heading), justify="right", overflow="fold")
    for cells in _cells(shown, names):
        table.add_row(*map(Text, cells))
    return table


def plot_metrics(rows: Iterable[Row], path_png: Path | str, path_html: Path | str, title: str = "Metrics") -> None:
    """Writes a picture of the metrics over event time, and a page with the picture and the numbers.

    One panel per metric. The page is one file that loads nothing: no script, no style, no font from
    elsewhere. Directories are made if need be. The lines of the first 2 % of the outcomes may leave a
    panel at its top or bottom. Raises `OSError` where a file cannot be written, and `ValueError` for a time
    that is neither ISO text nor an integer of microseconds.

    >>> import tempfile
    >>> rows = [{"time": day * 86_400_000_000, "outcomes": 10, "values": {"MAE": 0.5}} for day in (1, 2)]
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     plot_metrics(rows, f"{directory}/metrics.png", f"{directory}/metrics.html", "Bikes")
    ...     sorted(path.name for path in Path(directory).iterdir())
    ['metrics.html', 'metrics.png']
    """
    import matplotlib  # half a second to load: only those who want a picture wait for it

    ordered = _in_order(rows)
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(_thin(ordered, PLOT_ROWS), title)
        figure.savefig(png, format="png", dpi=160)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
    write_picture(Path(path_png), png.getvalue())
    write_picture(Path(path_html), _page(ordered, title, svg.getvalue()).encode())


def write_picture(path: Path, content: bytes) -> None:
    """Write a file, and the directories on the way to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: to_time_us(row["time"]))


def _thin(rows: Sequence[Row], limit: int) -> Sequence[Row]:
    """At most `limit` rows, evenly spread, first and last among them.

    >>> [row["time"] for row in _thin([{"time": t} for t in range(10)], 4)]
    [0, 3, 6, 9]
    """
    if len(rows) <= limit:
        return rows
    if limit < 2:
        return rows[-limit:] if limit == 1 else []
    return [rows[i * (len(rows) - 1) // (limit - 1)] for i in range(limit)]


def _names(rows: Iterable[Row]) -> list[str]:
    """The names of all metrics, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row["values"]))


def metric_heading(name: str) -> str:
    """A metric's name as people read it.

    >>> metric_heading("ROCAUC_rolling_1000")
    'ROCAUC last 1,000'
    """
    rolling = ROLLING.fullmatch(name)
    return name if rolling is None else f"{rolling['metric']} last {int(rolling['count']):,}"


def _value(value: Any) -> float:
    """A metric's value as a float; NaN for what is none."""
    if value is None or not math.isfinite(value):
        return math.nan
    return float(value)


def drawable(value: Any) -> float:
    """A value as a point: NaN, which is a gap, where there is none or no axis could hold it."""
    number = _value(value)
    return number if abs(number) < DRAWABLE else math.nan


def number_text(value: Any) -> str:
    """Four digits that matter.

    >>> [number_text(v) for v in (0.95, 0, 12345.678, 0.00012, None, float("nan"))]
    ['0.9500', '0.0000', '12,345.7', '1.2e-04', '–', '–']
    """
    number = _value(value)
    if math.isnan(number):
        return MISSING
    if abs(number) >= 1_000:
        return f"{number:,.1f}" if abs(number) < 1e9 else f"{number:.3e}"
    return f"{number:.4f}" if number == 0 or abs(number) >= 0.001 else f"{number:.1e}"


def _moment(time: Any) -> datetime:
    return to_datetime(to_time_us(time))


def _cells(rows: Iterable[Row], names: Sequence[str]) -> list[list[str]]:
    return [
        [
            f"{_moment(row['time']):%Y-%m-%d %H:%M:%S}",
            f"{row['outcomes']:,}",
            *(number_text(row["values"].get(name)) for name in names),
        ]
        for row in rows
    ]


def _caption(rows: Sequence[Row], shown: Sequence[Row]) -> str | None:
    if not rows:
        return "no outcomes yet"
    return None if len(shown) == len(rows) else f"{len(shown)} of {len(rows):,} rows"


def _summary(rows: Sequence[Row]) -> str:
    """What the rows cover, in words."""
    if not rows:
        return "no outcomes yet"
    first, last = _moment(rows[0]["time"]), _moment(rows[-1]["time"])
    span = f"{first:%Y-%m-%d}" + (f" to {last:%Y-%m-%d}" if last.date() != first.date() else "")
    return f"{rows[-1]['outcomes']:,} outcomes, {span} (event time, UTC)"


def _panels(rows: Sequence[Row]) -> dict[str, list[Series]]:
    """The lines of each panel, by metric; the one since the start first.

    >>> values = {"AUC_rolling_100": 0.5, "AUC": None}
    >>> _panels([{"time": 0, "outcomes": 1, "values": values}])
    {'AUC': [Series(values=(nan,), last=None), Series(values=(0.5,), last=100)]}
    """
    panels: dict[str, list[Series]] = {}
    for name in _names(rows):
        rolling = ROLLING.fullmatch(name)
        values = tuple(drawable(row["values"].get(name)) for row in rows)
        series = Series(values, None if rolling is None else int(rolling["count"]))
        panels.setdefault(name if rolling is None else rolling["metric"], []).append(series)
    return {metric: sorted(lines, key=lambda line: line.last or 0) for metric, lines in panels.items()}


def _figure(rows: Sequence[Row], title: str) -> Figure:
    from matplotlib.figure import Figure

    panels = _panels(rows)
    height = 1.0 + 2.3 * max(len(panels), 1)
    figure = Figure(figsize=(10, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, rect=(0, 0, 1, 1 - 0.75 / height))
    # parse_math: a $ in a name is a dollar.
    figure.text(0.0145, 1 - 0.17 / height, title, fontsize=15, weight="bold", va="top", parse_math=False)
    figure.text(0.0145, 1 - 0.5 / height, _summary(rows), fontsize=9, color=QUIET, va="top")
    axes = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
    if not panels:
        axes[0].text(0.5, 0.5, "nothing to show yet", ha="center", va="center", color=QUIET)
        axes[0].set_axis_off()
        return figure
    times = [_moment(row["time"]) for row in rows]
    for ax, (metric, lines) in zip(axes, panels.items(), strict=True):
        _draw(ax, metric, times, lines)
        limit_axis(ax, rows, lines)
    date_axis(axes[-1], times[0], times[-1])
    return figure


def _draw(ax: Axes, metric: str, times: Sequence[datetime], lines: Sequence[Series]) -> None:
    """One panel: the metric's name, its lines, and a legend that says where each line ends."""
    for number, line in enumerate(lines):
        ax.plot(
            times,
            line.values,
            label=line.label,
            color=LINES[number % len(LINES)],
            linewidth=2.0 if line.last is None else 1.2,
            zorder=3 if line.last is None else 2,
            solid_capstyle="round",
            marker="o",
            markersize=3.5,
            markevery=lonely(line.values),
        )
    dress(ax, metric, len(lines))


def dress(ax: Axes, title: str, lines: int) -> None:
    """Title, legend and axes of a panel with so many lines."""
    ax.set_title(title, loc="left", fontsize=10.5, weight="bold", color=INK, pad=8, parse_math=False)
    legend = ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=lines,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.6,
    )
    for handle in legend.get_lines():
        handle.set_marker("")
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(length=0, pad=6)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-4, 6), useOffset=False)


def lonely(values: Sequence[float]) -> list[int]:
    """Where a value has no neighbour to draw a line to, so that it needs a dot.

    >>> lonely([1.0, math.nan, 2.0, 3.0, math.nan, 0.0])
    [0, 5]
    """
    padded = [math.nan, *values, math.nan]
    return [
        i
        for i, value in enumerate(values)
        if not math.isnan(value) and math.isnan(padded[i]) and math.isnan(padded[i + 2])
    ]


def limit_axis(ax: Axes, rows: Sequence[Row], lines: Sequence[Series]) -> None:
    """Fits the vertical axis to what came after the first, noisy outcomes."""
    enough = NOISY_SHARE * rows[-1]["outcomes"]
    settled = [
        value
        for line in lines
        for row, value in zip(rows, line.values, strict=True)
        if row["outcomes"] >= enough and not math.isnan(value)
    ]
    if not settled:
        return
    low, high = min(settled), max(settled)
    # A constant has no range of its own: a tenth of it, or one, keeps it in the middle.
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    ax.set_ylim(low - margin, high + margin)


def date_axis(ax: Axes, first: datetime, last: datetime) -> None:
    """Event time (UTC) below a panel."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(tz="UTC", minticks=4, maxticks=9)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(
        # By year, month, day, hour, minute, second: days say their month, and the year stands at the end.
        ConciseDateFormatter(
            locator,
            tz="UTC",
            formats=["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%S.%f"],
            zero_formats=["", "%Y", "%d %b", "%d %b", "%H:%M", "%H:%M"],
            offset_formats=["", "%Y", "%Y", "%d %b %Y", "%d %b %Y", "%d %b %Y %H:%M"],
        )
    )
    ax.xaxis.get_offset_text().set_color(QUIET)
    margin = (last - first) * 0.01 or timedelta(hours=12)  # one moment stands in the middle of its day
    ax.set_xlim(first - margin, last + margin)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933; background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }}
svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ padding: .3rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e9ec; }}
th {{ position: sticky; top: 0; background: #fff; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.quiet {{ color: #6b7780; }}
</style>
</head>
<body>
<div role="img" aria-label="{label}">
{svg}
</div>
<p class="quiet">{caption}</p>
<div class="wide">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</body>
</html>
"""


def _page(rows: Sequence[Row], title: str, svg: str) -> str:
    shown, names = _thin(rows, PAGE_ROWS), _names(rows)
    headings = ("event time (UTC)", "outcomes", *map(metric_heading, names))
    return PAGE.format(
        title=html.escape(title),
        label=html.escape(f"{title}: {', '.join(names)} over event time. {_summary(rows)}"),
        svg=svg[svg.index("<svg") :],  # without the XML prologue, which has no place inside a page
        caption=html.escape(_caption(rows, shown) or f"{len(rows):,} rows"),
        head="".join(f"<th>{html.escape(name)}</th>" for name in headings),
        body="\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in _cells(shown, names)
        ),
    )
