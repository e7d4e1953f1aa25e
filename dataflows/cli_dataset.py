"""The command `dataset`: what a model was asked and taught, as a file to train others with."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataflows.cli_state import Brokers, Data, Directory, JobArgument, Json, Labels, name_brokers, run_of
from dataflows.dataset import Dataset, Skew, Span, write_dataset
from dataflows.events import encode
from dataflows.runtime import load_job, with_inputs

out = Console()
errors = Console(stderr=True)


def dataset(
    job: JobArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="X.parquet, X.csv or X.jsonl.")],
    origin: Annotated[str, typer.Option("--from", metavar="TIME", help="Event time of the first question.")] = "start",
    until: Annotated[str, typer.Option(metavar="TIME", help="Only questions before this event time.")] = "end",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compute the rows again from the inputs, and compare.")
    ] = True,
    directory: Directory = None,
    kafka: Brokers = None,
    data: Data = None,
    labels: Labels = None,
    as_json: Json = False,
) -> None:
    """Write a training set: features as they were asked, labels as they became known.

    The same rows are then computed again, from the inputs and the order log, and compared: they agree on every one, or
    it is said where they do not (exit code 1), as a model must not be trained with other features than it is served.
    Of a run that goes on, the rows are those up to its newest checkpoint.
    """
    name_brokers(kafka)
    loaded = with_inputs(load_job(job), data, labels)
    skew: Skew | None = None
    with errors.status("reading the learn log") as status:

        def show(rows: int) -> None:
            status.update(f"{rows:,} rows")

        with closing(Dataset(loaded, run_of(loaded, directory), Span.of(origin, until), show)) as found:
            digests, rows, labelled = write_dataset(found, output, keep_digests=check)
            if check:
                skew = found.compare(digests)
    if as_json:
        told = {"rows": rows, "labelled": labelled, "file": str(output)}
        typer.echo(encode(told | ({} if skew is None else {"skew": _plain(skew)})), nl=False)
    else:
        text = f"{rows:,} rows, {labelled:,} with labels, in {output}"
        out.print(text, soft_wrap=True, markup=False, highlight=False)
        if skew is not None:
            _show(skew)
    if skew is not None and not skew.none:
        raise typer.Exit(1)


def _show(skew: Skew) -> None:
    compared = skew.rows - skew.unchecked
    if skew.unchecked:
        text = f"{skew.unchecked:,} rows were asked before the job was changed: the job of now cannot compute them"
        out.print(text, style="yellow", highlight=False, soft_wrap=True)
    if skew.not_kept:
        text = f"{skew.not_kept:,} questions before these are not in the learn log any more"
        out.print(text, style="yellow", highlight=False, soft_wrap=True)
    if skew.none:
        out.print(f"computed again, all {compared:,} rows are the same: no skew", style="green", highlight=False)
        return
    out.print(f"computed again, {skew.others:,} of {compared:,} rows are others", style="red", highlight=False)
    for count, what, ids in (
        (skew.only_logged, "only logged", skew.ids_logged),
        (skew.only_computed, "only computed again", skew.ids_computed),
    ):
        if count:
            named = ", ".join(map(repr, ids)) + (", …" if count > len(ids) else "")
            out.print(f"{count:,} rows are {what}: {named}", style="red", markup=False, highlight=False, soft_wrap=True)
    table = Table("id", "column", "logged", "computed again")
    for row in skew.unlike:
        for name, (logged, computed) in row.columns.items():
            table.add_row(*(Text(str(cell)) for cell in (row.id, name, logged, computed)))
    if skew.unlike:
        out.print(table)


def _plain(skew: Skew) -> dict[str, object]:
    found = {name: value for name, value in vars(skew).items() if name != "unlike"}
    return found | {"unlike": [{"id": each.id, "columns": each.columns} for each in skew.unlike]}
