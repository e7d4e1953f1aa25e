"""The command that looks at a job's rejects and sends them again."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataflows.cli_state import Brokers, Directory, JobArgument, name_brokers
from dataflows.events import Reject, encode
from dataflows.job import JobError
from dataflows.rejects import Choice, Listing, RejectLog, Resubmission, Sent
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory, Settings

out = Console()
errors = Console(stderr=True)

SHOWN = 20
"""Rejects to show when nothing is said."""

_BEGINNING = 160
_DETAIL = 400
"""Characters of a record, and of what is wrong with it, to show at most."""


class Input(StrEnum):
    """The values of `--input`."""

    events = "events"
    labels = "labels"


def rejects(
    job: JobArgument,
    directory: Directory = None,
    kafka: Brokers = None,
    reason: Annotated[list[str] | None, typer.Option(metavar="REASON", help="Only these; repeat for several.")] = None,
    of_input: Annotated[
        Input | None, typer.Option("--input", help="Only those of the events, or of the labels.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many to show (20), newest first; with --resubmit, how many to send (all), oldest first."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of them (or the newest --limit) as JSON lines.")] = False,
    resubmit: Annotated[
        bool, typer.Option("--resubmit", help="Send the originals to the input they came from, each once.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --resubmit: append lines that came from files to this one."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="With --resubmit: also what was sent before.")] = False,
) -> None:
    """Show what a job could not use, by reason, from where its rejects go; or send it to the job's inputs again."""
    if not resubmit and (to is not None or again):
        raise JobError(f"{'--again' if to is None else '--to'} says how to send rejects again. Hint: add --resubmit")
    name_brokers(kafka)
    loaded = load_job(job)
    run = RunDirectory.of(loaded, Settings(directory=directory))
    log, sent = RejectLog(loaded, run), Sent(run)
    choice = Choice(frozenset(reason) if reason else None, None if of_input is None else of_input.value)
    if resubmit:
        work = Resubmission(log, choice, sent, to, limit, again)
        try:
            work.run()
        finally:  # also when it breaks off: how far it got
            _tell(work, as_json)
        if work.failed:
            raise typer.Exit(1)
    elif not as_json:
        _show(log, log.look(choice, SHOWN if limit is None else limit, sent))
    elif limit is None:
        for _, record in log.read(choice):
            _print_line(record)
    else:
        for record in reversed(log.look(choice, limit, sent).newest):
            _print_line(record)


def _print_line(record: Reject) -> None:
    typer.echo(encode(record), nl=False)


def _show(log: RejectLog, listing: Listing) -> None:
    total = sum(listing.counts.values())
    _say(f"{_some(total)} of {log.job.name} in {log.sink.where()}")
    if not total:
        return
    table = Table("reason", box=SIMPLE_HEAD)
    table.add_column("rejects", justify="right")
    table.add_column("sent again", justify="right")
    for name, count in listing.counts.most_common():
        again = listing.again[name]
        table.add_row(Text(printable(name, _BEGINNING)), f"{count:,}", f"{again:,}" if again else "")
    out.print(table)
    if listing.newest:
        _say("all of them, newest first:" if len(listing.newest) == total else f"the newest {len(listing.newest):,}:")
    for record in listing.newest:
        _say(
            f"{printable(record.place, _BEGINNING)}  {printable(record.reason, _BEGINNING)}: "
            f"{printable(record.detail, _DETAIL)}"
        )
        _say(f"    {beginning(record)}")


def _some(count: int) -> str:
    return "1 reject" if count == 1 else f"{count:,} rejects"


def _say(text: str, to: Console = out, style: str | None = None) -> None:
    to.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def _tell(work: Resubmission, as_json: bool) -> None:
    if as_json:
        told = {
            "sent": work.counts, "sent_before": work.before, "left": work.left,
            "failed": work.failed, "fault": work.fault,
        }  # fmt: skip
        typer.echo(msgspec.json.encode(told))
        return
    for where, count in work.counts.items():
        _say(f"{_some(count)} sent to {where}")
    if not work.counts:
        _say("nothing was sent")
    if work.before:
        _say(f"{_some(work.before)} left out: sent before (--again sends them again)")
    for why, count in work.left.items():
        _say(f"{_some(count)} cannot be sent: {why}")
    if work.failed:
        fault = printable(work.fault or "", _DETAIL)
        _say(
            f"millrace: {_some(work.failed)} could not be sent. The first: {fault}. "
            "Hint: what was sent is remembered; the same command goes on with the others",
            errors,
            "red",
        )


def beginning(record: Reject) -> str:
    """How the original begins, fit for a terminal.

    >>> beginning(Reject("invalid", "no number", "a.jsonl:1", '{"a": "[red]\\x1b[2J"}'))
    '{"a": "[red]\\\\x1b[2J"}'
    """
    if record.original is None:
        return "(no value)"
    if record.encoding == "base64":
        return printable(repr(record.original_bytes()[:_BEGINNING]), _BEGINNING)
    return printable(record.original, _BEGINNING) or "(empty)"


def printable(text: str, limit: int) -> str:
    """Text without anything that would steer a terminal or turn the direction of writing; cut off at a limit.

    >>> printable("a\\tb\\u202ec", 9), printable("abcdef", 4)
    ('a\\\\tb\\\\u20…', 'abc…')
    """
    safe = "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1]])
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
