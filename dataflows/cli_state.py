"""The commands that look into a job's state: checkpoints, savepoint, state."""

from __future__ import annotations

import os
import time as wall
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataflows.checkpoints import Checkpoints, Manifest, openable
from dataflows.control import Control
from dataflows.history import open_state
from dataflows.job import Job, JobError
from dataflows.query import PastState, Question, describe_time
from dataflows.runtime import is_running, load_job, with_inputs
from dataflows.settings import RunDirectory, Settings
from dataflows.startup import RunError
from dataflows.state import Version

out = Console()

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job file or module; with :NAME for another name than `job`.")
]
Directory = Annotated[Path | None, typer.Option(help="The run's directory. Default: runs/NAME.")]
Brokers = Annotated[
    str | None,
    typer.Option(
        "--kafka", metavar="HOST:PORT", help="Brokers of the topics that name none (or MILLRACE_KAFKA_BROKERS)."
    ),
]
Data = Annotated[
    str | None, typer.Option("--data", help="Read events from this file or directory instead; - is standard input.")
]
Labels = Annotated[str | None, typer.Option("--labels", help="Read labels from this file or directory instead.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


_MODELS = 20
"""Models to show in a table; with one for each entity there may be many."""


def name_brokers(brokers: str | None) -> None:
    """Let topics that name no brokers be on these, in workers too."""
    if brokers is not None:
        os.environ["MILLRACE_KAFKA_BROKERS"] = brokers


def checkpoints(
    job: JobArgument,
    directory: Directory = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every row of each, to see if it can be opened.")
    ] = False,
    delete: Annotated[str | None, typer.Option(metavar="SAVEPOINT", help="Delete a savepoint.")] = None,
    as_json: Json = False,
) -> None:
    """List the checkpoints and savepoints of a job: version, event time, wall time, size."""
    run = run_of(load_job(job), directory)
    found = Checkpoints(run)
    if delete is not None:
        found.unname(delete)
    names: dict[Version, list[str]] = {}
    for name, manifest in found.savepoints().items():
        names.setdefault(manifest.version, []).append(name)
    manifests = found.all()
    faults = {m.version: openable(m, run) for m in manifests} if verify else {}
    if as_json:
        rows = [
            _described(m) | {"savepoints": names.get(m.version, [])} | ({"fault": faults[m.version]} if verify else {})
            for m in manifests
        ]
        typer.echo(msgspec.json.encode(rows).decode())
        return
    table = Table(box=SIMPLE_HEAD)
    for column in ("checkpoint", "event time", "written", "events", "open", "wrote", "savepoints"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("events", "open", "wrote") else "left")
    if verify:
        table.add_column("can be opened")
    for m in manifests:
        written = m.written_at[:16].replace("T", " ")
        cells = [str(m.version), describe_time(m), written, f"{m.questions:,}", f"{m.open:,}", size_text(m.bytes)]
        cells.append(", ".join(names.get(m.version, ())))
        if verify:
            cells.append(escape(faults[m.version] or "yes"))
        table.add_row(*cells)
    Console(width=max(out.width, 120)).print(table)  # rather wide than cut off
    total = sum(file.stat().st_size for file in run.groups.glob("*.sqlite3*"))
    out.print(f"{len(manifests)} checkpoints, {size_text(total)} in {run.groups}", soft_wrap=True)
    if any(faults.values()):
        raise typer.Exit(1)


def savepoint(
    job: JobArgument,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    directory: Directory = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the next checkpoint of a running job.")
    ] = 60.0,
) -> None:
    """Keep the state as it is now under a name, also while the job runs."""
    run = run_of(load_job(job), directory)
    found = Checkpoints(run)
    manifest = _up_to_now(run, found, timeout)
    found.name(name, manifest)
    out.print(f"savepoint {name}: checkpoint {manifest.version}, event time {describe_time(manifest)}")


def _up_to_now(run: RunDirectory, found: Checkpoints, timeout: float) -> Manifest:
    """The first checkpoint that has all that is published now; of a job that does not run, the newest."""
    published = Control(run.control).published if is_running(run) else 0
    end = wall.monotonic() + timeout
    while True:
        newest = found.newest()
        if newest is not None and newest.batch >= published:
            return newest
        if not is_running(run) and newest is not None:  # it ended meanwhile: nothing newer will come
            return newest
        if wall.monotonic() > end:
            raise RunError(
                f"no checkpoint of batch {published} came within {timeout:.0f} s. Hint: a longer --timeout? "
                "How often the job makes them is said by `millrace run --checkpoint SECONDS`"
            )
        wall.sleep(0.1)


def state(
    job: JobArgument,
    entity: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Of which entity, e.g. card_id=42; repeat for two fields."),
    ] = None,
    at: Annotated[
        str,
        typer.Option(metavar="WHEN", help="A checkpoint, savepoint, batch (1-421), event time, or `latest`."),
    ] = "latest",
    known: Annotated[
        str | None,
        typer.Option("--known-at", metavar="TIME", help="As the job knew it at this time of the wall clock."),
    ] = None,
    directory: Directory = None,
    kafka: Brokers = None,
    data: Data = None,
    labels: Labels = None,
    limit: Annotated[int, typer.Option(min=0, help="Open questions to show.")] = 20,
    as_json: Json = False,
) -> None:
    """Show features, open questions, models and metrics, read from the state store while the job runs.

    Between checkpoints the logged batches after the one before are worked on again, from the inputs. `--at` is event
    time, `--known-at` when the job had taken what it took: with both, the state as of one as it was known at the other.
    """
    name_brokers(kafka)
    loaded = with_inputs(load_job(job), data, labels)
    past = open_state(loaded, run_of(loaded, directory), at, known)
    try:
        of = parse_entity(entity or [])
        found = _entity_state(past, of) if of else _whole_state(past)
        typer.echo(msgspec.json.encode(found, enc_hook=str).decode()) if as_json else _show(found, limit)
    finally:
        past.close()


def parse_entity(entity: list[str]) -> dict[str, Any]:
    """Values by field from `FIELD=VALUE`. Raises `JobError`."""
    of: dict[str, Any] = {}
    for text in entity:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise JobError(f"--entity {text}: give a field and a value, e.g. --entity card_id=42")
        of[field.strip()] = value
    return of


def _whole_state(past: PastState) -> dict[str, Any]:
    models = {model.name: model.version for model in past.models().values()}
    return _described(past.manifest) | {"entities": past.counts(), "models": models, "metrics": past.metrics()}


def _entity_state(past: PastState, of: dict[str, Any]) -> dict[str, Any]:
    questions = [_question(q) for q in past.open_questions(**of)]
    found: dict[str, Any] = {"checkpoint": str(past.manifest.version), "event_time": describe_time(past.manifest)}
    found |= {"entity": of, "features": past.features(**of), "questions": questions}
    if past.job.per is None or set(past.job.per) <= set(of):
        model = past.model(**of)
        found["models"] = {} if model is None else {model.name: model.version}
    return found


def _question(question: Question) -> dict[str, Any]:
    return question._asdict() | {"time": question.time.isoformat(), "output": _plain(question.output)}


def _plain(output: Any) -> Any:
    """A distribution with its labels as text, for JSON."""
    return {str(label): p for label, p in output.items()} if isinstance(output, dict) else output


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "checkpoint": str(manifest.version),
        "event_time": describe_time(manifest),
        "written_at": manifest.written_at,
        "events": manifest.questions,
        "open": manifest.open,
        "bytes": manifest.bytes,
        "stall": manifest.stall,
    }


def _show(found: dict[str, Any], limit: int) -> None:
    table = Table(show_header=False, title=f"as of checkpoint {found['checkpoint']}", title_justify="left")
    table.add_row("event time", found["event_time"])
    for name in ("events", "open"):
        if name in found:
            table.add_row(name, f"{found[name]:,}")
    for name, value in found.get("features", {}).items():
        table.add_row(name, escape(repr(value)))
    for name, count in found.get("entities", {}).items():
        table.add_row(name.removeprefix("features_"), f"{count:,} entities")
    models = found.get("models", {})
    for name, version in list(models.items())[:_MODELS]:
        table.add_row(f"model {escape(name)}", f"learned from {version:,}")
    if len(models) > _MODELS:
        table.add_row(f"{len(models) - _MODELS:,} more models", "--entity shows one, --json all")
    for name, value in found.get("metrics", {}).items():
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    out.print(table)
    questions = found.get("questions")
    if questions is not None:
        _show_questions(questions, limit)


def _show_questions(questions: list[dict[str, Any]], limit: int) -> None:
    out.print(f"{len(questions):,} open questions")
    if questions and limit:
        table = Table("id", "asked", "said", "model version")
        for question in questions[-limit:]:
            cells = (question["id"], question["time"], question["output"], question["model_version"])
            table.add_row(*(escape(str(cell)) for cell in cells))
        out.print(table)


def size_text(count: int) -> str:
    """Bytes for people.

    >>> size_text(512), size_text(20_480), size_text(3_400_000)
    ('512 B', '20.0 KB', '3.2 MB')
    """
    size, units = float(count), iter(("KB", "MB", "GB", "TB"))
    if size < 1024:
        return f"{count} B"
    unit = next(units)
    size /= 1024
    while size >= 1024:
        size, unit = size / 1024, next(units, unit)
    return f"{size:.1f} {unit}"


def run_of(job: Job, directory: Path | None) -> RunDirectory:
    """Where the run of a job lies. Raises `RunError` where there is none."""
    run = RunDirectory.of(job, Settings(directory=directory))
    if not run.job.exists():
        raise RunError(
            f"{run.path} holds no state of {job.name}. Hint: `millrace run` makes it; --directory says where"
        )
    return run
