"""The commands `models` and `score`: versions of models, and models in use elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataflows.bundle import Bundle, check_models, read_about, read_bundle, write_bundle
from dataflows.changes import describe
from dataflows.cli_state import Brokers, Data, Directory, JobArgument, Json, Labels, name_brokers, parse_entity, run_of
from dataflows.events import Record, encode, encode_lines, to_datetime
from dataflows.job import KIND_OF, Job, JobError
from dataflows.models import Detail, Listed, Models
from dataflows.order import Reader
from dataflows.provenance import differences, environment
from dataflows.query import typed
from dataflows.replay import PlainRun, inputs_of
from dataflows.rows import key_getter
from dataflows.runtime import load_job, with_inputs

out = Console()
errors = Console(stderr=True)


class Action(StrEnum):
    """What `models` does."""

    list = "list"
    show = "show"
    export = "export"


def models(
    job: JobArgument,
    action: Annotated[Action, typer.Argument(metavar="[list|show|export]")] = Action.list,
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="Examples learned, as listed; `latest` for export.")
    ] = "latest",
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="For export: the bundle to write.")] = None,
    entity: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Whose model, of a job with a model for each.")
    ] = None,
    features: Annotated[
        bool, typer.Option("--features/--no-features", help="For export: with the features of all entities.")
    ] = True,
    limit: Annotated[int, typer.Option(min=1, help="Versions to list.")] = 20,
    directory: Directory = None,
    kafka: Brokers = None,
    data: Data = None,
    labels: Labels = None,
    as_json: Json = False,
) -> None:
    """List versions of a job's models, tell all of one, or export one as a bundle.

    A version knows what it grew from, the examples between, the code that made it, its hyperparameters and its metrics.
    A bundle is what `millrace score` and another job's `warm_start=` take.
    """
    name_brokers(kafka)
    loaded = with_inputs(load_job(job), data, labels)
    key = _key(loaded, entity)
    with closing(Models(loaded, run_of(loaded, directory))) as found:
        if action is Action.list:
            _list(found.list(key, limit), as_json)
        elif action is Action.show:
            _show(found.show(version, key), as_json)
        else:
            if file is None:
                raise JobError("say where to: millrace models JOB export VERSION FILE")
            _export(found, version, key, features, file, job)


def _key(job: Job, entity: list[str] | None) -> Any:
    """The key of a model from --entity; None without."""
    if not entity:
        return None
    if job.per is None:
        raise JobError(f"{job.name} has one model for all. Hint: leave --entity out")
    given = parse_entity(entity)
    missing = [name for name in job.per if name not in given]
    if missing:
        raise JobError(
            f"--entity: {', '.join(missing)} is missing; {job.name} has a model for each {', '.join(job.per)}"
        )
    return key_getter(job.per, job)({name: typed(job, name, given[name]) for name in job.per})


def _list(found: list[Listed], as_json: bool) -> None:
    if as_json:
        rows = [row._asdict() | {"batch": str(row.batch), "newest": to_datetime(row.newest)} for row in found]
        typer.echo(encode(rows), nl=False)
        return
    if not found:
        out.print("no version has a keyframe yet; `millrace state` tells how far the models are")
        return
    names = list(dict.fromkeys(name for row in found for name in row.metrics))
    table = Table(box=SIMPLE_HEAD)
    for column in ("version", "model", "grew from", "examples since", "event time", "batch", "commit", *names):
        table.add_column(column, no_wrap=True)
    for row in found:
        metrics = [_number(row.metrics.get(name)) for name in names]
        since = (f"{row.since:,}", f"{to_datetime(row.newest):%Y-%m-%d %H:%M}", str(row.batch), row.commit[:10])
        table.add_row(row.version, escape(row.model), row.grew_from, *since, *metrics)
    Console(width=max(out.width, 120)).print(table)
    out.print("metrics: of the last checkpoint before each", style="dim")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _show(detail: Detail, as_json: bool) -> None:
    told: dict[str, Any] = {
        "version": detail.version,
        "model": detail.name,
        "learned from": f"{detail.examples:,} examples",
        "grew from": detail.grew_from,
        "hyperparameters": detail.hyperparameters,
        "batch": str(detail.batch),
    }
    for name, example in (("first example since", detail.first), ("last example", detail.last)):
        if example is not None:
            known = to_datetime(example.moment).isoformat()
            told[name] = f"event {example.id!r}, label {example.label!r}, known {known}"
    if detail.checkpoint is not None:
        told["metrics of"] = f"checkpoint {detail.checkpoint}, {detail.outcomes:,} outcomes"
    told |= detail.metrics
    if as_json:
        typer.echo(encode(told | {"examples": detail.examples, "made by": detail.maker}), nl=False)
        return
    table = Table(show_header=False)
    for name, value in (told | detail.maker).items():
        table.add_row(name, escape(_number(value) if isinstance(value, float) else str(value)))
    out.print(table)


def _export(found: Models, version: str, key: Any, features: bool, file: Path, job: str) -> None:
    bundle = found.export(version, key, features)
    if not bundle.models:
        raise JobError("there is no model to export yet")
    bundle.about["job_file"] = job
    write_bundle(file, bundle)
    learned = ", ".join(f"{examples:,}" for examples in list(bundle.about["examples"].values())[:3])
    entities = sum(len(rows) for parts in bundle.features.values() for _, _, rows in parts)
    out.print(
        f"{len(bundle.models):,} model{'s' if len(bundle.models) > 1 else ''} ({learned} examples), features of "
        f"{entities:,} entities, as of {bundle.about['as_of']}, in {file}",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


# -- elsewhere


def score(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `millrace models JOB export` wrote.")],
    events: Annotated[str, typer.Argument(metavar="EVENTS", help="A file of events, as the job's own.")],
    job: Annotated[
        str | None, typer.Option(metavar="JOB", help="The job file. Default: where it was when the bundle was made.")
    ] = None,
    labels: Labels = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Write records there. Default: predictions to stdout.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Write the models as they are at the end to a new bundle.")
    ] = None,
) -> None:
    """Answer events with the models of a bundle, which go on learning: in this process, without Kafka, without state.

    Features go on from those in the bundle; events before these are rejected. Questions that waited for their labels
    when it was made, and ids that were seen, are not in it.
    """
    about = read_about(bundle)
    loaded = with_inputs(_job_of(about, bundle, job), events, labels)
    _check(about, loaded, bundle)
    opened = read_bundle(bundle, loaded)
    if about["clock"] is not None and opened.features:
        earliest = about["clock"] - loaded.time.lateness
        loaded = loaded.changed(time=loaded.time.model_copy(update={"earliest": earliest}))
    if output is not None:
        _make_empty(output)
    plain = PlainRun(loaded, Reader(inputs_of(loaded), loaded.time), opened)
    counts = _write(plain.run(), output)
    if save is not None:
        write_bundle(save, _saved(plain, opened))
    rejects = f", {counts['rejects']:,} rejects" if counts["rejects"] else ""
    errors.print(
        f"{counts['predictions']:,} predictions, {counts['outcomes']:,} outcomes{rejects}"
        + "".join(f" · {name} {value:.4f}" for name, value in plain.publisher.evaluator.values().items()
                  if value is not None),
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _job_of(about: dict[str, Any], bundle: Path, named: str | None) -> Job:
    """The job as named, or from where it was when the bundle was made."""
    if named is not None:
        return load_job(named)
    file = about.get("job_file")
    if not isinstance(file, str):
        raise JobError(f"{bundle} does not say which job file made it. Hint: --job FILE")
    if file.partition(":")[0].endswith(".py") and not Path(file.partition(":")[0]).is_file():
        raise JobError(f"{file}, which made {bundle}, is not there. Hint: --job FILE says where it is now")
    return load_job(file)


def _check(about: dict[str, Any], job: Job, path: Path) -> None:
    """Refuse a bundle whose features or models are not those of the job; tell what else is not as it was."""
    check_models(about, job, str(path))
    declared, now = about["declared"], describe(job, 1)
    if about["per"] != (None if job.per is None else list(job.per)):
        raise JobError(f"{path}: per was {about['per']} and is {job.per}. Hint: the job as it was")
    for step in sorted(declared["steps"].keys() | now["steps"].keys()):
        if step.startswith("features_") and declared["steps"].get(step) != now["steps"].get(step):
            raise JobError(f"{path} was made with other features: {step} is not what it was. Hint: the job as it was")
    if declared["names"] != now["names"]:
        raise JobError(f"{path} was made with the features {', '.join(declared['names'])}. Hint: the job as it was")
    then = {name: value for name, value in about["made_by"].items() if name in environment()}
    for text in differences(then, environment()) if then else []:
        errors.print(f"not as it was then: {text}", style="yellow", highlight=False, soft_wrap=True)


_CHUNK = 5_000
"""Records that are written at once."""


def _make_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise JobError(f"--output {output} is not empty. Hint: another directory")
    output.mkdir(parents=True, exist_ok=True)


def _write(records: Iterator[Record], output: Path | None) -> Counter[str]:
    counts: Counter[str] = Counter()
    while some := list(islice(records, _CHUNK)):
        kinds: dict[str, list[Record]] = {}
        for record in some:
            kinds.setdefault(KIND_OF[type(record)], []).append(record)
        for kind, its in kinds.items():
            counts[kind] += len(its)
            if output is not None:
                with (output / f"{kind}.jsonl").open("ab") as file:
                    file.write(encode_lines(its))
            elif kind == "predictions":
                sys.stdout.buffer.write(encode_lines(its))
    sys.stdout.flush()
    return counts


def _saved(plain: PlainRun, bundle: Bundle) -> Bundle:
    """The bundle of a run's end."""
    learned, features = plain.bundle(bundle)
    examples = {key: count for key, (_, count) in learned.items()}
    clock = bundle.about["clock"] if plain.admit.clock is None else plain.admit.clock
    scored = datetime.now(UTC).isoformat(timespec="seconds")
    about = bundle.about | {"examples": examples, "clock": clock, "as_of": f"scored {scored}"}
    return Bundle(about | {"grew_from": bundle.about["examples"]}, learned, features)
