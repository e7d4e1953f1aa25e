"""The commands that do a run again: replay, and bootstrap."""

from __future__ import annotations

import os
import time as wall
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dataflows.cli_state import Brokers, Data, Directory, JobArgument, Labels, name_brokers, run_of
from dataflows.fork import Fork, renames
from dataflows.history import Place, chain, find, last_batch
from dataflows.job import Job, JobError
from dataflows.order import ReadMode
from dataflows.progress import Progress
from dataflows.runtime import Launcher, load_job, lock_state, with_inputs, with_outputs
from dataflows.settings import RunDirectory, Settings, Start, read_branches
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
    declared = load_job(job)
    run = run_of(declared, directory)
    again = with_inputs(load_job(other) if other is not None else declared, data, labels)
    if output.resolve() == run.path.resolve():
        raise JobError(f"--output {output} is the run itself. Hint: another directory")
    begin = find(run, origin)
    branch, last = _way(declared, run, begin, until)
    quiet = 0 if origin == "start" else last_batch(declared, run, begin)
    if last is not None and last < quiet:
        raise JobError(f"--until {until} (batch {last}) lies before --from {origin} (batch {quiet})")
    log = chain(run, branch, last)
    manifest = begin.manifest if begin.manifest.batch else None
    fork = Fork(run, log, manifest, renames(log, again))
    regroup = _regroups(run, again)
    status = _launch(
        other or job, again, RunDirectory(output), fork, output, workers, quiet, regroup, reset, (data, labels)
    )
    counts = status.get("counts", {})
    said = ", ".join(f"{counts.get(kind, 0):,} {kind}" for kind in ("predictions", "outcomes", "rejects"))
    out.print(f"{said}, made again in {output}", soft_wrap=True, markup=False, highlight=False)


def _way(job: Job, run: RunDirectory, begin: Place, until: str) -> tuple[Start, int | None]:
    """The branch to follow, and its last batch; None: all there are."""
    if until != "end":
        end = find(run, until)
        if not _leads(begin, end.branch):
            raise JobError(f"--until {until} is on branch {end.branch.branch}, which does not go through --from")
        return end.branch, last_batch(job, run, end)
    branches = [branch for branch in reversed(read_branches(run)) if _leads(begin, branch)]
    return branches[0], None


def _leads(begin: Place, branch: Start) -> bool:
    """Whether a branch goes through a place."""
    if begin.manifest.batch == 0 and begin.batch is None and begin.moment is None:
        return True
    batch = begin.batch if begin.batch is not None else begin.manifest.batch
    if branch.branch == begin.branch.branch:
        return True
    return any(on == begin.branch.branch and batch <= until for on, until in branch.forks)


def _launch(
    reference: str, job: Job, target: RunDirectory, fork: Fork, outputs: Path, workers: int, quiet: int, regroup: bool,
    reset: list[str] | None, inputs: tuple[str | None, str | None],
) -> dict[str, Any]:  # fmt: skip
    """Run a fork to the end of its order log; the last status."""
    if target.path.exists() and any(target.path.iterdir()) and not target.job.exists():
        raise JobError(f"{target.path} is not empty. Hint: another directory")
    settings = Settings(
        directory=target.path,
        groups=int(read_job(target if target.job.exists() else fork.source)["groups"]),
        read=ReadMode(logged=True, regroup=regroup),
        quiet=quiet,
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
    if target.job.exists() and not (target.path / "history").exists():
        raise RunError(f"{directory} holds a run that was not bootstrapped. Hint: another --directory")
    started = wall.monotonic()
    log = chain(run, read_branches(run)[-1])
    fork = Fork(run, log, None, renames(log, declared))
    branch = read_branches(target)[-1].branch if target.job.exists() else 1
    history = target.path / "history" / str(branch)
    status = _launch(job, declared, target, fork, history, workers, 0, _regroups(run, declared), None, (data, labels))
    _hand_over(declared, target)
    out.print(
        f"{status.get('questions', 0):,} events in {wall.monotonic() - started:.1f} s; their records are in {history}. "
        f"`millrace run {job} --directory {directory}` goes on from here",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _regroups(run: RunDirectory, job: Job) -> bool:
    """Whether a job holds events back otherwise than the one of a run."""
    read = read_job(run)["steps"]["read"]
    return bool(read != {"order": job.time.order, "lateness": job.time.lateness})


def _hand_over(job: Job, target: RunDirectory) -> None:
    """Have the next run begin its own outputs: on a branch of its own."""
    lock = lock_state(target.state)
    try:
        settings = Settings(directory=target.path, groups=int(read_job(target)["groups"]))
        Startup(job, settings, Request(origin="latest", outputs_anew=True), lambda text: None).prepare()
    finally:
        os.close(lock)
