"""The commands that do a run again: replay, and bootstrap."""

from __future__ import annotations

import os
import time as wall
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dataflows.cli_state import Brokers, Data, Directory, JobArgument, Labels, name_brokers, run_of
from dataflows.fork import Asked, Fork, renames
from dataflows.history import Place, chain, find, last_batch
from dataflows.job import Job, JobError
from dataflows.order import ReadMode
from dataflows.progress import Progress
from dataflows.runtime import Launcher, load_job, lock_state, with_inputs, with_outputs
from dataflows.settings import RunDirectory, Settings, Start, output_sinks, read_branches
from dataflows.startup import Request, RunError, Startup, read_job

out = Console()
errors = Console(stderr=True)

Reset = Annotated[
    list[str] | None, typer.Option(metavar="STEP", help="Begin this step's state anew, if the job's change needs it.")
]
Workers = Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")]


def replay(
    job: JobArgument,
    output: Annotated[Path, typer.Option(metavar="DIRECTORY", help="Where records and state go; new or empty.")],
    origin: Annotated[
        str, typer.Option("--from", metavar="WHEN", help="`start`, a checkpoint, savepoint, batch or event time.")
    ] = "start",
    until: Annotated[str, typer.Option(metavar="WHEN", help="`end`, a checkpoint, a batch, or an event time.")] = "end",
    other: Annotated[
        str | None, typer.Option("--with", metavar="OTHER_JOB", help="Another job over the same batches of events.")
    ] = None,
    reset: Reset = None,
    workers: Workers = 1,
    directory: Directory = None,
    kafka: Brokers = None,
    data: Data = None,
    labels: Labels = None,
) -> None:
    """Do a part of a run again, from the state before it, the order log and the inputs; in a new state directory.

    The run is not touched, and nothing that it predicted is read. With the same job the records are the same, to the
    last byte; with another one, or with other labels, they are what would have been: `millrace diff` compares.
    Interrupted, the same command goes on.
    """
    name_brokers(kafka)
    # First: what it writes names the classes of its module, which another of the same name would have taken.
    again = with_inputs(load_job(other or job), data, labels)
    declared = again if other is None and data is None and labels is None else load_job(job)
    run, target = run_of(declared, directory), RunDirectory(output)
    if output.resolve() == run.path.resolve():
        raise JobError(f"--output {output} is the run itself. Hint: another directory")
    asked, begin = _asked(declared, run, target, Asked(source=_name(run), job=other or job, origin=origin, until=until))
    branch = next(start for start in read_branches(run) if start.branch == asked.branch)
    log = chain(run, branch, asked.last)
    manifest = begin.manifest if begin is not None and begin.manifest.batch else None
    changed = other is not None or data is not None or labels is not None
    first = read_branches(target)[-1].batch if begin is None else begin.manifest.batch
    fork = Fork(run, log, manifest, renames(log, again, first, manifest), changed or _regroups(run, branch, again))
    status = _launch(other or job, again, target, fork, asked, output, workers, reset, (data, labels))
    counts = status.get("counts", {})
    said = ", ".join(f"{counts.get(kind, 0):,} {kind}" for kind in ("predictions", "outcomes", "rejects"))
    out.print(f"{said}, made again in {output}", soft_wrap=True, markup=False, highlight=False)


def _name(run: RunDirectory) -> str:
    return str(run.path.resolve())


def _asked(job: Job, run: RunDirectory, target: RunDirectory, asked: Asked) -> tuple[Asked, Place | None]:
    """What a replay is to do, and where it begins; None where it has begun: then it goes on with what it was to do."""
    before = Asked.of(target)
    if before is not None:
        given = {"source", "job", "origin", "until"}
        if asked.model_dump(include=given) != before.model_dump(include=given):
            raise JobError(
                f"{target.path} was begun with {before.job} over {before.source} --from {before.origin} --until "
                f"{before.until}. Hint: the same once more, or another --output"
            )
        if target.job.exists():
            return before, None
    begin, branch, last = _way(job, run, asked.origin, asked.until)
    quiet = 0 if asked.origin == "start" else last_batch(job, run, begin)
    if last is not None and last < quiet:
        raise JobError(f"--until {asked.until} (batch {last}) lies before --from {asked.origin} (batch {quiet})")
    return asked.model_copy(update={"branch": branch.branch, "last": last, "quiet": quiet}), begin


def _way(job: Job, run: RunDirectory, origin: str, until: str) -> tuple[Place, Start, int | None]:
    """Where to begin, the branch to follow, and its last batch; None: all there are."""
    begin = find(run, origin)
    end = None if until == "end" else find(run, until)
    if end is not None and end.moment is None and begin.moment is not None:
        begin = find(run, origin, end.branch)  # a time says nothing of branches, a batch does
    branches = [branch for branch in reversed(read_branches(run)) if _leads(begin, branch)]
    if end is None:
        return begin, branches[0], None
    if end.moment is not None:
        end = find(run, until, branches[0])
    if not _leads(begin, end.branch):
        raise JobError(f"--until {until} is on branch {end.branch.branch}, which does not go through --from {origin}")
    return begin, end.branch, last_batch(job, run, end)


def _leads(begin: Place, branch: Start) -> bool:
    """Whether a branch goes through a place."""
    if begin.manifest.batch == 0 and begin.batch is None and begin.moment is None:
        return True
    batch = begin.batch if begin.batch is not None else begin.manifest.batch
    if branch.branch == begin.branch.branch:
        return True
    return any(on == begin.branch.branch and batch <= until for on, until in branch.forks)


def _launch(
    reference: str, job: Job, target: RunDirectory, fork: Fork, asked: Asked, outputs: Path, workers: int,
    reset: list[str] | None, inputs: tuple[str | None, str | None],
) -> dict[str, Any]:  # fmt: skip
    """Run a fork to the end of its order log; the last status."""
    if target.path.exists() and any(target.path.iterdir()) and Asked.of(target) is None:
        raise JobError(f"{target.path} is not empty. Hint: another directory")
    asked.keep(target)
    settings = Settings(
        directory=target.path,
        groups=int(read_job(target if target.job.exists() else fork.source)["groups"]),
        read=ReadMode(logged=True),
        quiet=asked.quiet,
    )
    request = Request(fork=fork, reset=tuple(reset or ()))
    redirected = with_outputs(job, str(outputs))
    launcher = Launcher(
        reference, redirected, workers, 10.0, settings, request,
        data=inputs[0], labels=inputs[1], outputs=str(outputs),
        say=lambda text: errors.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
    )  # fmt: skip
    with Progress(errors) as progress:
        status = launcher.run(progress.show)
    if launcher.stopped:
        raise RunError("stopped with a checkpoint; the same command goes on")
    return status


def bootstrap(
    job: JobArgument,
    source: Annotated[
        Path,
        typer.Option("--from-run", metavar="DIRECTORY", help="The run whose history it is."),
    ],
    directory: Annotated[Path, typer.Option(help="Of the new run; new, or one that was bootstrapped before.")],
    workers: Workers = 1,
    kafka: Brokers = None,
    data: Data = None,
    labels: Labels = None,
) -> None:
    """Compute a new or changed job over the history of a run, so that it can take over with warm features and model.

    The batches that the run has taken are worked on again, in the same order, in a new directory, while the run goes
    on. The records of history go to `history/` there and nowhere else. Then `millrace run JOB --directory DIRECTORY`
    goes on with the first event after them, and its outputs begin. Used again, it catches up with what the run has
    taken meanwhile.
    """
    name_brokers(kafka)
    declared = with_inputs(load_job(job), data, labels)
    run, target = RunDirectory(source), RunDirectory(directory)
    if not run.job.exists():
        raise RunError(f"{source} holds no run. Hint: the directory that `millrace run` wrote to")
    if source.resolve() == directory.resolve():
        raise JobError("--directory is the run itself. Hint: the new job needs a directory of its own")
    before = Asked.of(target)
    if target.job.exists() and (before is None or before.job != _BOOTSTRAP):
        raise RunError(f"{directory} holds a run that was not bootstrapped. Hint: another --directory")
    if before is not None and before.source != _name(run):
        raise RunError(f"{directory} was bootstrapped from {before.source}. Hint: another --directory")
    _refuse_taken_outputs(declared, target)
    started = wall.monotonic()
    newest = read_branches(run)[-1]
    log = chain(run, newest)
    # The job is another one: what it makes of the records may be ready sooner or later, and more or less.
    fork = Fork(run, log, None, renames(log, declared), regroup=True)
    branch = read_branches(target)[-1].branch if target.job.exists() else 1
    history = target.path / "history" / str(branch)
    asked = Asked(source=_name(run), job=_BOOTSTRAP, branch=newest.branch, history=branch)
    status = _launch(job, declared, target, fork, asked, history, workers, None, (data, labels))
    _hand_over(declared, target)
    asked.model_copy(update={"history": None}).keep(target)
    out.print(
        f"{status.get('questions', 0):,} events in {wall.monotonic() - started:.1f} s; their records are in {history}. "
        f"`millrace run {job} --directory {directory}` goes on from here",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


_BOOTSTRAP = "(bootstrap)"
"""In place of the job of a replay."""


def _refuse_taken_outputs(job: Job, target: RunDirectory) -> None:
    """The outputs that are the job's own once it goes on alone begin empty: what lies there is another run's."""
    for kind, sink in output_sinks(job, target.path).items():
        if sink.size():
            raise RunError(
                f"{sink.where()} is not empty, and the new job's {kind} are to begin there. "
                "Hint: declare another place for them; a run that has gone on by itself cannot be bootstrapped again"
            )


def _regroups(run: RunDirectory, branch: Start, job: Job) -> bool:
    """Whether any part of the way to a branch was made by a job that held events back otherwise."""
    ways = {branch.branch, *(on for on, _ in branch.forks)}
    read = [(start.job or read_job(run))["steps"]["read"] for start in read_branches(run) if start.branch in ways]
    return any(each != {"order": job.time.order, "lateness": job.time.lateness} for each in read)


def _hand_over(job: Job, target: RunDirectory) -> None:
    """Have the next run begin its own outputs: on a branch of its own."""
    lock = lock_state(target.state)
    try:
        settings = Settings(directory=target.path, groups=int(read_job(target)["groups"]))
        Startup(job, settings, Request(origin="latest", outputs_anew=True), lambda text: None).prepare()
    finally:
        os.close(lock)
