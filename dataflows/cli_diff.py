"""The command that shows what differs between two runs."""

from __future__ import annotations

import html
import io
import math
import time as wall
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dataflows.cli_state import Json
from dataflows.diff import (
    MAX_WAITING,
    Difference,
    FieldDiff,
    FileRead,
    KindDiff,
    Moment,
    RunDiff,
    Single,
    Sizes,
    compare,
    spread,
    total_bytes,
)
from dataflows.events import Metrics, encode, to_datetime, to_time_us
from dataflows.job import JobError
from dataflows.order import InputError

# The same looks as those of `millrace backtest`.
from dataflows.report import (
    MISSING,
    PAGE,
    PLOT_ROWS,
    QUIET,
    STYLE,
    Series,
    date_axis,
    drawable,
    dress,
    limit_axis,
    lonely,
    metric_heading,
    number_text,
    write_picture,
)
from dataflows.runtime import disk_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

out = Console()
errors = Console(stderr=True)

SHOWN_FEATURES = 20
SHOWN_VALUES = 12
SHOWN_ROWS = 24
"""Rows of a table at most; the JSON has all of them."""

_VALUE = 60
_NAME = 32
"""Characters of a value, and of a directory's name, to show at most."""

COLOURS, WIDTHS, DOTS = ("#f2b98a", "#1f5fa8"), (4.5, 1.4), (7.0, 3.5)
"""Of A and B: a broad pale line and a thin dark one over it, so that where they coincide both are seen."""

_PATIENCE_S = 1.0
"""What is done by then needs no progress bar."""


def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The directory of a run, or of a replay's --output.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    directory: Annotated[
        Path | None,
        typer.Option(help="Where plots of both runs' metrics go, as diff.png and diff.html. Default: none are made."),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(min=1, help="Records that may wait for their counterpart in memory; more are given up, counted."),
    ] = MAX_WAITING,
    as_json: Json = False,
) -> None:
    """Show what differs between two runs: predictions, features, outcomes, rejects, metrics over time.

    Exit code 0: nothing differs; 1: something does; 2: they could not be compared.
    """
    try:
        found = _compared(run_a, run_b, max_waiting)
        typer.echo(encode(found.as_dict()), nl=False) if as_json else show(found)
        if directory is not None:
            plot(found, directory)
            console = errors if as_json else out
            console.print(f"plots in {directory / 'diff.png'} and {directory / 'diff.html'}", soft_wrap=True)
    except (JobError, InputError, OSError) as error:
        # As all errors of ours are shown; but 1 is taken here, as by diff(1), and an error is no difference.
        text = f"millrace: {error}{disk_hint(str(error))}"
        errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if found.differs:
        raise typer.Exit(1)


def _compared(run_a: Path, run_b: Path, max_waiting: int) -> RunDiff:
    """What differs; on a terminal with a bar where it takes long."""
    if not errors.is_terminal:
        return compare(run_a, run_b, max_waiting)
    bar = Bar(TextColumn("{task.description}"), BarColumn(), console=errors, transient=True)
    task = bar.add_task("", total=total_bytes(run_a, run_b))
    begun = wall.monotonic()

    def progress(path: Path, size: int) -> None:
        bar.update(task, advance=size, description=f"comparing {path.stem}")
        if wall.monotonic() - begun > _PATIENCE_S:
            bar.start()

    try:
        return compare(run_a, run_b, max_waiting, progress)
    finally:
        bar.stop()


# -- tables


def show(found: RunDiff) -> None:
    """Print what differs, the whole first and the details after it."""
    console = Console(width=max(out.width, 120))  # rather wide than cut off
    for name, path in (("A", found.a), ("B", found.b)):
        _say(f"{name}: {path}")
    console.print(_overview(found))
    for note in notes(found):
        _say(note)
    if not found.differs:
        _say("nothing differs")
        return
    for name, kind in found.kinds.items():
        if kind.fields or kind.parts:
            console.print(_fields(name, kind))
        if name in ("predictions", "outcomes"):
            _show_firsts(console, name.removesuffix("s"), kind)
    if any(apart for moment in found.moments for *_, apart in (moment.outcomes, *moment.values.values())):
        console.print(_moments(found))


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _overview(found: RunDiff) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("in both", "equal", "differ", "only in A", "only in B", "not compared"):
        table.add_column(heading, justify="right")
    for name, kind in found.kinds.items():
        lost = kind.uncompared_a + kind.uncompared_b
        counts = (kind.both, kind.equal, kind.both - kind.equal, kind.only_a, kind.only_b, lost)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def notes(found: RunDiff) -> Iterator[str]:
    """What has to be said of how the runs were compared."""
    for name, kind in found.kinds.items():
        yield from _of_files(name, kind.file_a, kind.file_b)
        if kind.respelled:
            yield f"{name}: {kind.respelled:,} of the equal ones are written differently (1 and 1.0, order of features)"
        if kind.uncompared_a or kind.uncompared_b:
            yield (
                f"{name}: {kind.uncompared_a:,} of A and {kind.uncompared_b:,} of B were not compared: too many waited "
                "for their counterpart. Hint: a larger --max-waiting"
            )


def _of_files(name: str, a: FileRead, b: FileRead) -> Iterator[str]:
    if a.missing and b.missing:
        yield f"neither has {name}.jsonl"
    elif a.missing or b.missing:
        yield f"there is no {a.path if a.missing else b.path}: taken as empty"
    for file in (a, b):
        if file.cut is not None:
            yield f"{file.path}:{file.cut}: the last line is not complete and left out; is the run still writing?"


def _fields(name: str, kind: KindDiff) -> Table:
    """By field and feature: how often it differs, and by how much."""
    parts = list(kind.parts.items())[:SHOWN_FEATURES]
    left = len(kind.parts) - len(parts)
    caption = f"{left:,} more differ; --json has all of them" if left else None
    table = Table(box=SIMPLE_HEAD, title=f"{name} by field", title_justify="left", caption=caption)
    table.add_column("")
    for heading in ("differ", "largest", "mean", "median", "90 %", "99 %", "missing in A", "missing in B"):
        table.add_column(heading, justify="right")
    for field, change in kind.fields.items():
        table.add_row(Text(field, style="bold"), *_change_cells(change))
    for field, change in parts:
        table.add_row(Text(f"  {field}" if kind.fields else field), *_change_cells(change))
    return table


def _change_cells(change: FieldDiff) -> tuple[str, ...]:
    missing = (f"{count:,}" if count else "" for count in (change.missing_a, change.missing_b))
    return (f"{change.differ:,}", *_size_cells(change.sizes), *missing)


def _size_cells(sizes: Sizes | None) -> tuple[str, ...]:
    if sizes is None:
        return ("",) * 5
    return tuple(f"{size:.4g}" for size in (sizes.largest, sizes.mean, *sizes.quantiles.values()))


def _show_firsts(console: Console, word: str, kind: KindDiff) -> None:
    if kind.first is not None:
        first = kind.first
        where = f"line {first.line_a:,} of A, {first.line_b:,} of B"
        _say(f"first {word} that differs: {_short(first.key)}, event time {_time_text(first.time)} ({where})")
        console.print(_values(first))
    for name, single in (("A", kind.first_only_a), ("B", kind.first_only_b)):
        if single is not None:
            _say(f"first {word} only in {name}: {_single(single)}")


def _single(single: Single) -> str:
    return f"{_short(single.key)}, event time {_time_text(single.time)} (line {single.line:,})"


def _values(first: Difference) -> Table:
    """What differs of two records."""
    left = len(first.fields) - SHOWN_VALUES
    caption = f"{left:,} more differ; --json has all of them" if left > 0 else None
    table = Table("", "A", "B", box=SIMPLE_HEAD, caption=caption)
    for name, values in list(first.fields.items())[:SHOWN_VALUES]:
        table.add_row(Text(name), *(_value_text(values, side) for side in "ab"))
    return table


def _value_text(values: Mapping[str, Any], side: str) -> Text:
    return Text(_short(values[side])) if side in values else Text("not there", style="dim")


def _short(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = encode(value).decode().rstrip("\n")
    return text if len(text) <= _VALUE else f"{text[: _VALUE - 1]}…"


def _time_text(time: Any) -> str:
    return "unknown" if time is None else encode(time).decode().strip('"\n')


def _moments(found: RunDiff) -> Table:
    """A, B and their difference for each metric, at the last report that both had reached and at some before."""
    names = list(dict.fromkeys(name for moment in found.moments for name in moment.values))
    table = Table(box=SIMPLE_HEAD, title="metrics over event time", title_justify="left")
    table.add_column("")
    table.add_column("event time (UTC)", no_wrap=True)
    for heading in ("A", "B", "B − A"):
        table.add_column(heading, justify="right")
    shown = spread(found.moments, max(2, SHOWN_ROWS // (len(names) + 1)))
    for moment in shown:
        table.add_row("outcomes", _clock(moment), *(f"{count:,}" for count in moment.outcomes))
    for name in names:
        table.add_section()
        for moment in shown:
            table.add_row(*_metric_cells(name, moment))
    if len(shown) < len(found.moments):
        table.caption = f"{len(shown)} of {len(found.moments):,} moments; --json has all of them"
    return table


def _clock(moment: Moment) -> str:
    return f"{moment.time:%Y-%m-%d %H:%M:%S}"


def _metric_cells(name: str, moment: Moment) -> tuple[Text, ...]:
    cells = (metric_heading(name), _clock(moment), *_triple(moment.values.get(name, (None, None, None))))
    return tuple(map(Text, cells))


def _triple(values: Sequence[float | None]) -> tuple[str, str, str]:
    """A and B with the digits that matter, their difference with its sign.

    >>> _triple((0.5, 0.75, 0.25)), _triple((0.5, 0.5, 0.0)), _triple((None, 2.0, None))
    (('0.5000', '0.7500', '+0.25'), ('0.5000', '0.5000', '0'), ('–', '2.0000', '–'))
    """
    a, b, apart = values
    return number_text(a), number_text(b), MISSING if apart is None else f"{apart:+.3g}" if apart else "0"


# -- plots


def plot(found: RunDiff, directory: Path) -> None:
    """Writes `diff.png`, a panel per metric with a line for each run, and the page `diff.html` with the numbers too."""
    import matplotlib  # half a second to load: only those who want a picture wait for it

    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(found)
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    write_picture(directory / "diff.png", png.getvalue())
    write_picture(directory / "diff.html", _page(found, svg.getvalue()).encode())


def run_names(a: str, b: str) -> tuple[str, str]:
    """What two runs are called in a picture: by their directories, with as much of the path as tells them apart.

    >>> run_names("runs/payments", "runs/what-if"), run_names("monday/out", "tuesday/out")
    (('A: payments', 'B: what-if'), ('A: monday/out', 'B: tuesday/out'))
    """
    parts_a, parts_b = Path(a).resolve().parts, Path(b).resolve().parts
    count = 1
    while parts_a[-count:] == parts_b[-count:] and count < max(len(parts_a), len(parts_b)):
        count += 1
    named = (f"{side}: {_tail('/'.join(parts[-count:]))}" for side, parts in (("A", parts_a), ("B", parts_b)))
    first, second = named
    return first, second


def _tail(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[-_NAME + 1 :]}"


def _metric_names(found: RunDiff) -> list[str]:
    return list(dict.fromkeys(name for r in (*found.reports_a, *found.reports_b) for name in r.values))


def _figure(found: RunDiff) -> Any:
    from matplotlib.figure import Figure

    names = _metric_names(found)
    height = 1.0 + 2.3 * max(len(names), 1)
    figure = Figure(figsize=(10, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12, rect=(0, 0, 1, 1 - 0.75 / height))
    label_a, label_b = run_names(found.a, found.b)
    # parse_math: a $ in a name is a dollar.
    figure.text(0.0145, 1 - 0.17 / height, "Two runs", fontsize=15, weight="bold", va="top", parse_math=False)
    subtitle = f"{label_a}   {label_b}   (event time, UTC)"
    figure.text(0.0145, 1 - 0.5 / height, subtitle, fontsize=9, color=QUIET, va="top", parse_math=False)
    axes = figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0]
    if not names:
        axes[0].text(0.5, 0.5, "nothing to show yet", ha="center", va="center", color=QUIET)
        axes[0].set_axis_off()
        return figure
    for ax, name in zip(axes, names, strict=True):
        _draw(ax, name, {label_a: found.reports_a, label_b: found.reports_b})
    times = [_when(report) for report in (*found.reports_a, *found.reports_b)]
    date_axis(axes[-1], min(times), max(times))
    return figure


def _when(report: Metrics) -> datetime:
    return to_datetime(to_time_us(report.time))


def _draw(ax: Axes, metric: str, runs: Mapping[str, Sequence[Metrics]]) -> None:
    """One panel: a metric's name, the line of each run, and a legend that says where each ends."""
    rows: list[Metrics] = []
    drawn: list[float] = []
    for number, (label, reports) in enumerate(runs.items()):
        kept = spread(reports, PLOT_ROWS)
        values = [drawable(report.values.get(metric)) for report in kept]
        ax.plot(
            list(map(_when, kept)),
            values,
            label=_ending(label, values),
            color=COLOURS[number],
            linewidth=WIDTHS[number],
            zorder=2 + number,
            solid_capstyle="round",
            marker="o",
            markersize=DOTS[number],
            markevery=lonely(values),
        )
        rows += kept
        drawn += values
    dress(ax, metric_heading(metric), len(runs))
    limit_axis(ax, [{"outcomes": report.outcomes} for report in rows], [Series(tuple(drawn))])


def _ending(label: str, values: Sequence[float]) -> str:
    """What a line is called, with where it ends.

    >>> _ending("A: payments", [0.5, 0.75, math.nan])
    'A: payments, 0.7500'
    """
    known = [value for value in values if not math.isnan(value)]
    return f"{label}, {number_text(known[-1])}" if known else label


def _page(found: RunDiff, svg: str) -> str:
    names = _metric_names(found)
    title = " and ".join(run_names(found.a, found.b))
    headings = [
        "event time (UTC)",
        *(f"{metric_heading(name)} {side}" for name in names for side in ("A", "B", "B − A")),
    ]
    return PAGE.format(
        title=html.escape(title),
        label=html.escape(f"{title}: {', '.join(names)} over event time."),
        svg=svg[svg.index("<svg") :],  # without the XML prologue, which has no place inside a page
        caption=html.escape(f"A: {found.a}, B: {found.b}; {len(found.moments):,} moments that both have reached"),
        head=_cells("th", headings),
        body="\n".join(f"<tr>{_cells('td', _page_row(moment, names))}</tr>" for moment in found.moments),
    )


def _page_row(moment: Moment, names: Sequence[str]) -> list[str]:
    nothing = (None, None, None)
    return [_clock(moment), *(cell for name in names for cell in _triple(moment.values.get(name, nothing)))]


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
