"""One trial: a job that is killed again and again, goes on, and must give what an undisturbed run gives."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dataflows.checkpoints import Checkpoints, openable
from dataflows.control import Phase
from dataflows.job import KINDS, Job
from dataflows.runtime import load_job, with_inputs
from dataflows.settings import RunDirectory, Settings
from dataflows.startup import Request, Startup
from tests.chaos.jobs import JOBS
from tests.chaos.killer import Hit, Killer, Wanted
from tests.chaos.runs import Fault, Quiet, Run, until
from tests.chaos.states import PlainRun, log_fault, output_difference, state_at, state_difference
from tests.chaos.streams import Inputs, lines
from tests.chaos.wreck import Wreck, inspect

GROUPS = 6
STARTS_MAX = 5
"""Starts to hit the start: it comes once each time."""

ORDERED = ("predictions", "outcomes", "metrics")
"""Kinds whose order does not depend on how batches were cut."""


class Plan(NamedTuple):
    """What a trial does.

    `processes` are taken in turn, one number for each start. `fed`: input comes while it runs, else it is there from
    the start. `stopped`: in the end it is stopped with everything read and questions open, else it goes to the end of
    input. `flush`: after how many changes steps write early. `kept`: checkpoints. `restarts`: the launcher starts
    workers again. `rate`: lines fed in a second. `without`: what of the product is switched off, to see it missed.
    """

    job: str
    order: str
    processes: tuple[int, ...] = (1,)
    fed: bool = False
    stopped: bool = False
    seed: int = 1
    batch_size: int = 32
    checkpoint: float = 0.15
    flush: int = 1024
    kept: int = 10
    cache: int = 500_000
    restarts: bool = False
    events: int | None = None
    rate: int = 4000
    without: str = ""

    @property
    def reference(self) -> str:
        """The job, as `millrace run` takes it."""
        return f"tests.chaos.jobs:{self.job}_{self.order}"

    def __str__(self) -> str:
        ways = ["fed" if self.fed else "whole input", "stopped" if self.stopped else "to its end"]
        ways += [f"flush {self.flush}"] * (self.flush < 1024) + [f"cache {self.cache}"] * (self.cache < 1000)
        ways += ["restarts"] * self.restarts
        return f"{self.job}, {self.order}, {'/'.join(map(str, self.processes))} processes, {', '.join(ways)}"


class Kill(NamedTuple):
    """A kill with what it left behind; None where workers were started again at once."""

    hit: Hit
    processes: int
    wreck: Wreck | None


class Trial:
    """See the module.

    Parameters
    ----------
    plan
        What is done.
    directory
        Where everything of the trial goes.
    undisturbed
        Directories of runs that nothing happened to, shared by trials with the same input.
    killer
        Who strikes.
    """

    def __init__(self, plan: Plan, directory: Path, undisturbed: Path, killer: Killer) -> None:
        self.plan = plan
        self.directory = directory
        self.out = directory / "out"
        self._undisturbed = undisturbed
        self._killer = killer
        declared = JOBS[plan.job]
        self._lines = lines(declared.kind, plan.seed, plan.events or declared.events)
        directory.mkdir(parents=True)
        self.inputs = Inputs(directory / "in", self._lines)
        self.job: Job = load_job(plan.reference)
        self._starts = 0
        self._fed_at = 0.0

    # -- disturbing

    def disturb(self, wanted: list[Wanted]) -> Iterator[Kill]:
        """One kill after the other; fewer than wanted where the run comes to the end of its input before."""
        if not self.plan.fed:
            self.inputs.feed_all()
        follow = self.plan.fed or self.plan.stopped
        run: Run | None = None
        try:
            for each in wanted:
                hit = None
                for _ in range(STARTS_MAX if each.phase == "start" else 1):
                    run = run or self.start(follow)
                    hit = self._killer.strike(run, each, lambda run=run: self._feed(run))  # type: ignore[misc]
                    if hit is not None or run.code is not None:
                        break
                    if each.phase == "start":
                        run.stop() if follow else run.end()
                        run = None
                processes = self._processes()
                if hit is None or run is None:
                    break
                if self.plan.restarts and hit.victim == "worker":
                    until(lambda run=run: run.control.workers == Phase.NONE, "no new start", 90)  # type: ignore[misc]
                    yield Kill(hit, processes, None)
                    continue
                run.wait()
                run = None
                yield Kill(hit, processes, inspect(self.job, self.out))
            if run is not None and run.code is None:
                run.stop() if follow else run.end()
        finally:
            if run is not None:
                run.clean_up()

    def finish(self) -> None:
        """Go on to the end, undisturbed."""
        self.inputs.feed_all()
        run = self.start(follow=self.plan.stopped)
        try:
            self._end(run, self.inputs)
        finally:
            run.clean_up()

    def start(self, follow: bool) -> Run:
        """The next start, with the next number of processes."""
        run = Run(self.plan.reference, self.out, [*self._options(), *self._follow(follow)], self._environment())
        self._starts += 1
        return run

    def _options(self) -> list[str]:
        plan = self.plan
        processes = plan.processes[self._starts % len(plan.processes)]
        options = {
            "--workers": processes, "--checkpoint": plan.checkpoint, "--batch-size": plan.batch_size,
            "--groups": GROUPS, "--keep-last": plan.kept, "--cache": plan.cache,
            "--restart": 1000 if plan.restarts else 0,
        }  # fmt: skip
        return [*self.inputs.options, *(str(word) for pair in options.items() for word in pair)]

    def _processes(self) -> int:
        return self.plan.processes[(self._starts - 1) % len(self.plan.processes)]

    def _environment(self) -> dict[str, str]:
        return {"CHAOS_FLUSH": str(self.plan.flush), "CHAOS_WITHOUT": self.plan.without}

    @staticmethod
    def _follow(follow: bool) -> list[str]:
        return ["--follow"] if follow else []

    def _feed(self, run: Run) -> bool:
        """Some lines, at the plan's rate, while there is somebody to read them; whether there are more."""
        now = time.monotonic()
        if run.has_begun and self.inputs.left:
            count = int((now - self._fed_at) * self.plan.rate)
            if count > 0:
                self.inputs.feed(min(count, 100), cut=0.5)
                self._fed_at = now
        return self.inputs.left > 0

    def stop_when_read(self, run: Run) -> None:
        """SIGTERM once all that was fed went through."""
        self._stop_when_read(run, self.inputs)

    def _end(self, run: Run, inputs: Inputs) -> None:
        if self.plan.stopped:
            self._stop_when_read(run, inputs)
        else:
            run.end()

    def _stop_when_read(self, run: Run, inputs: Inputs) -> None:
        # A line without its end is not read.
        sizes = {path.name: path.read_bytes().rfind(b"\n") + 1 for path in inputs.paths.values()}

        quiet = Quiet(self.plan.reference, run.directory, sizes)

        def read_everything() -> bool:
            if run.code is not None:
                raise Fault(f"the run in {run.directory} ended by itself: {run.printed()}")
            return quiet.reached()

        until(read_everything, f"{run.directory} does not read everything", 90)
        run.stop()

    # -- comparing

    def differences(self) -> Iterator[str]:
        """What differs from undisturbed runs; nothing, as it should be."""
        return (text for text in self._compared() if text is not None)

    def _compared(self) -> Iterator[str | None]:
        if not self.plan.stopped:
            yield log_fault(self._log(self.out), self._line_counts())
        yield from self._from(self._as_logged())
        if not self.plan.fed or self.plan.order == "event_time":
            yield from self._from(self.from_whole_input(), logged=False)
        yield from self._checkpoint_differences()

    def _from(self, other: Path, logged: bool = True) -> Iterator[str | None]:
        """What differs from a run that cut the same batches, or (not `logged`) may have cut them elsewhere.

        Then rejects may be in another order, as they come first in their batch, and the reader may have read on.
        """
        yield output_difference(self.out, other, KINDS if logged else ORDERED)
        yield output_difference(self.out, other, ("rejects",), ordered=logged)
        states = []
        for directory in (self.out, other):
            run = RunDirectory(directory)
            manifest = Checkpoints(run).newest()
            if manifest is None:
                yield f"{directory} has no checkpoint"
                return
            states.append(state_at(self.job, run, manifest))
        if not logged:
            del states[0]["reader"]
        found = state_difference(*states)
        yield None if found is None else f"final state, against {other.name}: {found}"

    def _checkpoint_differences(self) -> Iterator[str]:
        """Every checkpoint that was kept against a run without engine, cut after the same batch."""
        run = RunDirectory(self.out)
        manifests = {manifest.batch: manifest for manifest in Checkpoints(run).all()}
        for manifest in manifests.values():
            wrong = openable(manifest, run)
            if wrong is not None:
                yield f"checkpoint {manifest.version} cannot be opened: {wrong}"
                return
        paths = self.inputs.paths
        job = with_inputs(self.job, str(paths["events"]), str(paths["labels"]) if "labels" in paths else None)
        plain = PlainRun(job, self._log(self.out), GROUPS)
        try:
            reached = 0
            for batch, state in plain.states(manifests.keys()):
                reached += 1
                found = state_difference(state, state_at(self.job, run, manifests[batch]))
                if found is not None:
                    yield f"checkpoint {manifests[batch].version} against a plain run: {found}"
            if reached < len(manifests):
                yield f"the order log gives {reached} of the {len(manifests)} checkpoints {sorted(manifests)}"
        finally:
            plain.close()

    def _as_logged(self) -> Path:
        """An undisturbed run of the same batches, in one process and with one checkpoint."""
        directory = self.directory / "as-logged"
        settings = Settings(directory=directory, groups=GROUPS)
        Startup(self.job, settings, Request(), say=lambda text: None).prepare()  # a state without a single batch
        shutil.copyfile(self._log(self.out), self._log(directory))
        self._run_undisturbed(directory, self.inputs)
        return directory

    def from_whole_input(self) -> Path:
        """The directory of an undisturbed run over the input as it is in the end, in one process; made once."""
        plan = self.plan
        name = f"{plan.job}-{plan.order}-{plan.seed}-{len(self._lines)}-{plan.batch_size}"
        name += "-stopped" * plan.stopped
        directory = self._undisturbed / name / "out"
        if not directory.exists():
            inputs = Inputs(directory.parent / "in", self._lines)
            inputs.feed_all()
            self._run_undisturbed(directory, inputs)
        return directory

    def _run_undisturbed(self, directory: Path, inputs: Inputs) -> None:
        interval = "0.2" if self.plan.stopped else "1000"
        options = [*inputs.options, "--checkpoint", interval, "--batch-size", str(self.plan.batch_size)]
        options += ["--groups", str(GROUPS), *self._follow(self.plan.stopped)]
        run = Run(self.plan.reference, directory, options, {})
        try:
            self._end(run, inputs)
        finally:
            run.clean_up()

    def _line_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for line in self._lines:
            counts[f"{line.file}.jsonl"] = counts.get(f"{line.file}.jsonl", 0) + 1
        return counts

    @staticmethod
    def _log(directory: Path) -> Path:
        return RunDirectory(directory).order_log(1)


def plan_of(number: int, rng: random.Random) -> Plan:
    """The plan of the trial with this number: jobs and orders in turn, the rest by chance."""
    jobs = list(JOBS)
    return Plan(
        job=jobs[number % len(jobs)],
        order=("event_time", "arrival")[(number // len(jobs) + number) % 2],
        processes=rng.choice([(1,), (2,), (1,), (2,), (1, 2, 3)]),
        fed=rng.random() < 0.5,
        stopped=rng.random() < 0.35,
        checkpoint=rng.choice([0.06, 0.12, 0.25]),
        flush=rng.choice([1024, 64, 8]),
        kept=rng.choice([1, 3, 10]),
        cache=rng.choice([500_000, 60]),
        restarts=rng.random() < 0.25,
    )
