"""The command `millrace`: run, backtest and check jobs; `cli_state` and `cli_rejects` look at what they hold."""

from __future__ import annotations

import sys
import time as wall
from collections import Counter
from contextlib import AbstractContextManager, closing, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from dataflows import cli_audit, cli_dataset, cli_diff, cli_models, cli_rejects, cli_replay, cli_state
from dataflows.checkpoints import Retention
from dataflows.cli_state import Brokers, Data, Directory, JobArgument, Labels, name_brokers
from dataflows.connectors import Kafka, Stdin, Stdout
from dataflows.evaluate import metric_name
from dataflows.events import Metrics, describe_faults, to_time_us
from dataflows.job import KINDS, Job, JobError, Label, SinkError
from dataflows.order import TO_THE_END, InputError, ReadMode
from dataflows.orderlog import OrderLogError
from dataflows.progress import Progress
from dataflows.runtime import Launcher, disk_hint, load_job, with_inputs
from dataflows.settings import RunDirectory, Settings, output_sinks
from dataflows.startup import Request, RunError, Startup, read_job
from dataflows.state import StateError
from features.spec import Entity, duration_text

app = typer.Typer(
    name="millrace",
    help="Online machine learning as one stateful stream job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
errors = Console(stderr=True)


class OnGap(StrEnum):
    """The values of `--on-gap`."""

    stop = "stop"
    earliest = "earliest"


class Durability(StrEnum):
    """The values of `--durability`."""

    power = "power"
    process = "process"


app.command()(cli_state.checkpoints)
app.command()(cli_state.savepoint)
app.command()(cli_state.state)
app.command()(cli_replay.replay)
app.command()(cli_replay.bootstrap)
app.command()(cli_rejects.rejects)
app.command()(cli_audit.audit)
app.command()(cli_dataset.dataset)
app.command()(cli_models.models)
app.command()(cli_models.score)
app.command()(cli_diff.diff)


@app.command()
def run(
    job: JobArgument,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    data: Data = None,
    labels: Labels = None,
    directory: Directory = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Events in a batch at the most.")] = 1000,
    linger: Annotated[float, typer.Option(min=0, help="Seconds an event may wait for its batch to fill.")] = 0.05,
    checkpoint: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 10.0,
    origin: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Go on from this checkpoint or savepoint, on a new branch."),
    ] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Begin this step's state anew, if the job's change needs it."),
    ] = None,
    restart: Annotated[
        int, typer.Option(min=0, metavar="TIMES", help="Start failed workers again, so often without progress.")
    ] = 0,
    keep_last: Annotated[int, typer.Option(min=1, help="Checkpoints to keep: the newest,")] = 10,
    keep_hourly: Annotated[int, typer.Option(min=0, help="and the last of each of so many hours,")] = 24,
    keep_daily: Annotated[int, typer.Option(min=0, help="days,")] = 30,
    keep_monthly: Annotated[int, typer.Option(min=0, help="and months.")] = 12,
    cache: Annotated[int, typer.Option(min=1, help="Entities of each kind kept in memory.")] = 500_000,
    durability: Annotated[
        Durability, typer.Option(help="What a checkpoint survives: loss of power, or the death of any process.")
    ] = Durability.power,
    groups: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Key groups; fixed when the state is created.", show_default="16"),
    ] = None,
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--no-follow", help="Wait for more at the end of the inputs.", show_default="yes with Kafka"
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="end|TIME",
            help="Read Kafka up to its end as of now, or to records of this time, as to the end of a file.",
        ),
    ] = None,
    on_gap: Annotated[
        OnGap, typer.Option(help="When Kafka's retention removed the records that come next: stop, or go on, counting.")
    ] = OnGap.stop,
    kafka: Brokers = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw state and outputs of earlier runs away.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="PORT", help="Serve measures of the run to Prometheus on this port."),
    ] = None,
    metrics_host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where --metrics-port listens; another address opens it to the network."),
    ] = "127.0.0.1",
) -> None:
    """Run a job on Bytewax. Killed or stopped, the next run goes on from the last checkpoint."""
    name_brokers(kafka)
    loaded = with_inputs(load_job(job), data, labels)
    if groups is None:
        groups = 16 if fresh else _groups_of(RunDirectory.of(loaded, Settings(directory=directory)))
    settings = Settings(
        directory=directory, batch_size=batch_size, linger=linger, groups=groups, cache=cache,
        read=read_mode(loaded, follow, until, on_gap), durability=durability.value, measures=metrics_port is not None,
    )  # fmt: skip
    retention = Retention(last=keep_last, hourly=keep_hourly, daily=keep_daily, monthly=keep_monthly)
    request = Request(origin=origin, reset=tuple(reset or ()), retention=retention)
    require_inputs(loaded)
    _warn_of_stdin(loaded)
    launcher = Launcher(
        job, loaded, workers, checkpoint, settings, request, fresh, restart, data, labels,
        say=lambda text: errors.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
    )  # fmt: skip
    started = wall.monotonic()
    # Records on standard output are for the next program in the pipe; what people read goes beside them.
    console = errors if writes_stdout(loaded) else out
    run_directory = RunDirectory.of(loaded, settings)
    afresh = fresh or origin is not None
    with _monitor(run_directory, loaded.name, metrics_host, metrics_port, afresh), Progress(console) as progress:
        status = launcher.run(progress.show)
    _summary(console, loaded, status, wall.monotonic() - started, launcher)


def _monitor(run: RunDirectory, job: str, host: str, port: int | None, afresh: bool) -> AbstractContextManager[object]:
    """What answers Prometheus during a run; nothing without a port."""
    if port is None:
        return nullcontext()
    from dataflows.monitor import Monitor

    return Monitor(run, job, host, port, afresh)


def read_mode(job: Job, follow: bool | None, until: str | None, on_gap: str) -> ReadMode:
    """How a run reads its inputs. Raises `JobError` where that contradicts itself."""
    if until is not None and follow:
        raise JobError("--until ends a run and --follow does not. Hint: one of them")
    if follow is None:
        inputs = (job.events, job.label.source)
        follow = until is None and any(source is not None and source.endless for source in inputs)
    try:
        moment = None if until in (None, "end") else to_time_us(str(until))
    except ValueError as error:
        raise JobError(f"--until {until}: {error}. Hint: end, or a time such as 2026-03-01T12:00:00Z") from None
    return ReadMode(follow=follow, until=moment, on_gap="earliest" if on_gap == "earliest" else "stop")


def _groups_of(run: RunDirectory) -> int:
    """The key groups of the state that is there, else the default."""
    return int(read_job(run)["groups"]) if run.job.exists() else 16


def writes_stdout(job: Job) -> bool:
    """Whether a kind of record goes to standard output."""
    return any(isinstance(getattr(job.outputs, kind), Stdout) for kind in KINDS)


def _warn_of_stdin(job: Job) -> None:
    if isinstance(job.events, Stdin):
        errors.print("standard input cannot be read again: this run cannot be resumed", style="yellow")


@app.command()
def backtest(
    job: JobArgument,
    delay: Annotated[str | None, typer.Option(help="Reveal each label this long after its event, e.g. 7d.")] = None,
    data: Data = None,
    labels: Labels = None,
    kafka: Brokers = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where the table and plots go. Default: runs/NAME/backtest.")
    ] = None,
) -> None:
    """Run a job over history in plain Python, labels revealed late: a table and a plot of its metrics."""
    name_brokers(kafka)
    loaded = with_delay(with_inputs(load_job(job), data, labels), delay)
    require_inputs(loaded)
    target = directory or (loaded.outputs.directory or Path("runs") / loaded.name) / "backtest"
    target.mkdir(parents=True, exist_ok=True)
    rows, counts = _play(loaded)
    _report(loaded, rows, counts, target, delay)


def _play(job: Job) -> tuple[list[dict[str, Any]], Counter[str]]:
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with Progress(out) as progress:
        for record in job.play():
            counts[type(record).__name__.lower()] += 1
            if isinstance(record, Metrics):
                rows.append({"time": record.time.isoformat(), "outcomes": record.outcomes, "values": record.values})
                progress.show(_play_status(record, counts))
    return rows, counts


def _play_status(record: Metrics, counts: Counter[str]) -> dict[str, Any]:
    return {
        "clock": None, "watermark": None, "open": counts["prediction"] - counts["outcome"],
        "questions": counts["prediction"], "metrics": record.values, "outcomes": record.outcomes,
        "counts": {"rejects": counts["reject"]},
    }  # fmt: skip


def _report(job: Job, rows: list[dict[str, Any]], counts: Counter[str], target: Path, delay: str | None) -> None:
    from dataflows.report import metric_table, plot_metrics

    title = f"{job.name}: {job.model_name}" + (f", labels after {delay}" if delay else "")
    out.print(metric_table(rows))
    plot_metrics(rows, target / "metrics.png", target / "metrics.html", title)
    out.print(
        f"{counts['prediction']:,} predictions, {counts['outcome']:,} outcomes, {counts['reject']:,} rejects; "
        f"plots in {target / 'metrics.png'} and {target / 'metrics.html'}",
        soft_wrap=True,
    )


def with_delay(job: Job, delay: str | None) -> Job:
    """The job with its labels revealed after another delay; raises `JobError` where labels have their own times."""
    if delay is None:
        return job
    if job.label.kind != "field":
        raise JobError(
            f"--delay {delay}: the labels of {job.name} come with times of their own. Hint: leave --delay out, "
            "they are revealed when they were"
        )
    named = {k: getattr(job.label, k) for k in ("field", "horizon", "otherwise", "revisions", "max_open")}
    return job.changed(label=Label(delay=delay, **named))


@app.command()
def check(
    job: JobArgument,
    data: Data = None,
    labels: Labels = None,
    directory: Directory = None,
    kafka: Brokers = None,
    reset: Annotated[list[str] | None, typer.Option(metavar="STEP", help="As for `millrace run`.")] = None,
) -> None:
    """Validate a job and draw it: steps, keys, the features the model will see; what a change does to its state."""
    name_brokers(kafka)
    loaded = with_inputs(load_job(job), data, labels)
    require_inputs(loaded)
    out.print(drawing(loaded))
    out.print(f"{loaded.name} is valid", style="green")
    _check_state(loaded, directory, tuple(reset or ()))


def _check_state(job: Job, directory: Path | None, reset: tuple[str, ...]) -> None:
    """Say what a run would do to the state that is there; exit code 1 where it would be refused."""
    run = RunDirectory.of(job, Settings(directory=directory))
    if not run.job.exists():
        return
    settings = Settings(directory=directory, groups=read_job(run)["groups"])
    changes = Startup(job, settings, Request(reset=reset), say=lambda text: None).changes()
    if not changes:
        out.print(f"the state in {run.state} fits: a run goes on with it", soft_wrap=True)
        return
    out.print(f"the job differs from that of the state in {run.state}:", soft_wrap=True)
    for change in changes:
        line = f"  {change.step}: {change.text}" + (" (refused)" if change.refused else "")
        out.print(line, style="red" if change.refused else None, markup=False, highlight=False, soft_wrap=True)
    if any(change.refused for change in changes):
        out.print("a run would refuse; undo the change, --reset what may begin anew, or --fresh")
        raise typer.Exit(1)
    out.print("a run would go on with it on a new branch")


def require_inputs(job: Job) -> None:
    """Raises FileNotFoundError or InputError for files that cannot be read, before anything is started or written."""
    seen: set[str] = set()
    for source in (job.events, job.label.source):
        if source is None:
            continue
        with closing(source.feed(TO_THE_END)) as feed:
            for name in feed.names():
                if name in seen:
                    raise InputError(f"two inputs are named {name!r}. Hint: give the files different names")
                seen.add(name)
                if not isinstance(source, Stdin):
                    feed.open(name, None).close()


def drawing(job: Job) -> Tree:
    """A job as a tree: its steps in the order of an event's road, with keys, windows and feature names."""
    tree = Tree(f"[bold]{job.name}[/]")
    time = f"order {job.time.order}, lateness {duration_text(job.time.lateness)}"
    read = tree.add(f"read: {job.events.event.__name__} from {job.events.describe()} ({time})")
    if job.label.source is not None:
        read.add(f"labels: {job.label_class.__name__} from {job.label.source.describe()}")
    tree.add(f"admit: label {job.label.field!r}, {_label_text(job.label)}")
    features = tree.add(f"features: {len(job.feature_names)}")
    for feature in job.features:
        node = features.add(escape(_feature_text(feature)))
        for name in feature.feature_names:
            node.add(name)
    each = "" if job.per is None else f", one for each {' and '.join(job.per)}"
    tree.add(f"learner: {job.model_name}{each}")
    tree.add(f"metrics: {', '.join(metric_name(m) for m in job.metrics) or 'none'}")
    sinks = output_sinks(job, job.outputs.directory or Path("runs") / job.name)
    outputs = tree.add("outputs")
    for kind, sink in sinks.items():
        outputs.add(escape(f"{kind}: {sink.where()}"))
    return tree


def _feature_text(feature: Any) -> str:
    if not isinstance(feature, Entity):
        return type(feature).__name__
    where = "" if feature.where is None else ", where given"
    return f"Entity {' and '.join(feature.key)}, of {feature.of}{where}"


def _label_text(label: Label) -> str:
    kinds = {"stream": "a stream of its own", "field": "of the same event, revealed later", "later": "of a later event"}
    text = kinds[label.kind]
    if label.horizon is None:
        return f"{text}, waits until it comes"
    return f"{text}, horizon {duration_text(label.horizon)}, otherwise {label.otherwise!r}"


def _summary(console: Console, job: Job, status: dict[str, Any], seconds: float, launcher: Launcher) -> None:
    counts = status.get("counts", {})
    table = Table(show_header=False, title=f"{job.name}: {job.model_name}", title_justify="left")
    table.add_row("records read", f"{status.get('read', 0):,}")
    table.add_row("events", f"{status.get('questions', 0):,}")
    for name in ("predictions", "outcomes"):
        table.add_row(name, f"{counts.get(name, 0):,}")
    table.add_row("open questions", f"{status.get('open', 0) if not status.get('end') else 0:,}")
    table.add_row("rejects", f"{counts.get('rejects', 0):,}")
    for name, value in counts.items():
        if name.startswith("rejects."):
            table.add_row(f"  {name.removeprefix('rejects.')}", f"{value:,}")
    for name, value in status.get("metrics", {}).items():
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    table.add_row("seconds", f"{seconds:.1f}")
    console.print(table)
    console.print(f"records in {launcher.directory}", soft_wrap=True)
    for kind, sink in output_sinks(job, launcher.directory).items():
        if isinstance(sink, Kafka):
            console.print(f"{kind} in {sink.describe()}", soft_wrap=True, markup=False, highlight=False)
    if launcher.stopped:
        console.print("stopped with a checkpoint; run again to go on")


def main() -> None:
    """The command's entry point: errors of ours are one message and exit code 1, not a traceback."""
    try:
        app()
    except ValidationError as error:
        errors.print(
            f"millrace: {error.title}: {describe_faults(error)}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except (JobError, RunError, StateError, InputError, SinkError, OrderLogError, OSError) as error:
        errors.print(
            f"millrace: {error}{disk_hint(str(error))}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(1)
