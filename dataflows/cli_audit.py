"""The command `audit`: predictions of the past made again and compared."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataflows.audit import Auditor, Remade
from dataflows.cli_state import Directory, JobArgument, Json, run_of
from dataflows.events import encode, to_datetime
from dataflows.findings import Findings
from dataflows.job import Job, JobError
from dataflows.runtime import load_job
from dataflows.state import StateError

out = Console()
errors = Console(stderr=True)


def audit(
    job: JobArgument,
    prediction: Annotated[str | None, typer.Argument(metavar="[ID]", help="The event id of a prediction.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every prediction that the learn log holds.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="So many, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="For --sample: another seed draws others.")] = 0,
    branch: Annotated[int | None, typer.Option(min=1, help="Of which branch. Default: the one that goes on.")] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Make predictions of the past again, from the examples that taught the model, and compare them bit for bit.

    Exit code 1 where something is not as it was. On the way to the predictions asked for, all others that have to be
    made again are compared too, and so are keyframes, the newest checkpoint's models, and the files of predictions and
    outcomes.
    """
    if (prediction is not None) + everything + (sample is not None) != 1:
        raise JobError("say what to audit: the ID of a prediction, --sample N, or --all")
    loaded = load_job(job)
    auditor = Auditor(loaded, run_of(loaded, directory), branch)
    try:
        if prediction is not None:
            passed = _one(auditor, _id(loaded, prediction), as_json)
        else:
            passed = _many(auditor, sample, seed, as_json)
    finally:
        auditor.close()
    if not passed:
        raise typer.Exit(1)


def _id(job: Job, text: str) -> int | str:
    """An event id as the events have it."""
    event = job.events.event
    if event.id_field is None:
        return text
    if event.model_fields[event.id_field].annotation is not int:
        return text
    try:
        return int(text)
    except ValueError:
        raise JobError(f"{text!r} is no id: {event.id_field} of {event.__name__} is a whole number") from None


def _one(auditor: Auditor, id: int | str, as_json: bool) -> bool:
    found = auditor.remake(id)
    if as_json:
        typer.echo(encode(_plain(found)), nl=False)
        return found.equal
    table = Table(show_header=False, title=f"prediction {found.id}", title_justify="left")
    for name, text in _rows(found):
        table.add_row(name, escape(text))
    out.print(table)
    _verdict(found.equal, "equal bit for bit" if found.equal else "not equal")
    _tell_changes(found.changed)
    return found.equal


def _rows(found: Remade) -> list[tuple[str, str]]:
    rows = [("event time", to_datetime(found.time).isoformat()), ("batch", str(found.batch)), ("model", found.model)]
    rows.append(("learned from", f"{found.version:,} examples"))
    again = f"examples {found.keyframe + 1:,} to {found.keyframe + found.relearned:,}" if found.relearned else "none"
    rows.append(("learned again", f"{again} (from the keyframe of {found.keyframe:,})"))
    if found.last is not None:
        known = to_datetime(found.last.moment).isoformat()
        rows.append(("the last of them", f"event {found.last.id!r}, label {found.last.label!r}, known {known}"))
    rows += [(f"  {name}", repr(value)) for name, value in found.features.items()]
    return [*rows, ("it said", repr(found.logged)), ("made again", repr(found.output))]


def _plain(found: Remade) -> dict[str, Any]:
    last = found.last
    return found._asdict() | {
        "batch": str(found.batch),
        "time": to_datetime(found.time),
        "last": None if last is None else {"id": last.id, "label": last.label, "known": to_datetime(last.moment)},
    }


def _many(auditor: Auditor, sample: int | None, seed: int, as_json: bool) -> bool:
    with errors.status("reading the learn log") as status:
        found = auditor.check(sample, seed, lambda now: status.update(_progress(now)))
    if not found.asked and not found.unkept and not found.wrong_in_all:
        raise StateError("the learn log holds no prediction yet")
    if as_json:
        typer.echo(encode(_summary(found)), nl=False)
        return found.passed
    known = found.asked - found.unknown
    if known:
        out.print(f"{found.equal:,} of {known:,} predictions are equal bit for bit, made again", highlight=False)
    if found.unknown:
        out.print(f"of {found.unknown:,} the log does not have what was said; --json gives what it is", soft_wrap=True)
    if found.unkept:
        out.print(
            f"{found.unkept:,} cannot be made again: what taught their models is not kept any more", soft_wrap=True
        )
    others = found.compared - found.asked
    for name, count, equal in (
        ("others on the way", others, found.compared_equal - found.equal),
        ("keyframes", found.keyframes, found.keyframes_equal),
        (f"models of checkpoint {found.checkpoint}", found.models, found.models_equal),
    ):
        if count and not (found.unknown and name.startswith("others")):
            out.print(f"{name}: {equal:,} of {count:,} equal", highlight=False)
    for kind, count in found.published.items():
        out.print(f"{kind} in the outputs: {count:,} compared", highlight=False)
    out.print(f"{found.relearned:,} examples learned again", highlight=False)
    if sample is not None:
        out.print("what the sample did not come to was not compared: --all does", style="dim", highlight=False)
    for wrong in found.wrong:
        of = "" if wrong.id is None else f"prediction {wrong.id!r}: "
        at = f"batch {wrong.batch}: " if wrong.batch.branch else ""
        out.print(f"  {at}{of}{wrong.text}", style="red", markup=False, highlight=False, soft_wrap=True)
    if found.wrong_in_all > len(found.wrong):
        out.print(f"  and {found.wrong_in_all - len(found.wrong):,} more", style="red")
    _verdict(found.passed, "all is as it was" if found.passed else "not all is as it was")
    _tell_changes(found.changed)
    return found.passed


def _progress(found: Findings) -> str:
    return f"{found.compared:,} predictions made again, {found.relearned:,} examples learned again"


def _summary(found: Findings) -> dict[str, Any]:
    wrong = [{"batch": str(w.batch) if w.batch.branch else None, "id": w.id, "what": w.text} for w in found.wrong]
    plain = {name: getattr(found, name) for name in found.__dataclass_fields__ if name not in ("wrong", "outputs")}
    outputs = [{"id": id, "output": output} for id, output in found.outputs]
    return plain | {"passed": found.passed, "wrong": wrong} | ({"outputs": outputs} if outputs else {})


def _verdict(good: bool, text: str) -> None:
    out.print(text, style="green" if good else "red", highlight=False)


def _tell_changes(changed: list[str]) -> None:
    for text in changed:
        out.print(f"not as it was then: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
