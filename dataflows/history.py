"""State between checkpoints: that of the nearest one before, and the logged batches after it, worked on again.

Nothing of the run is changed: its order log is read, its inputs are read again, and the state files are only looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from dataflows.admit import Admit, Work
from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.evaluate import Publisher
from dataflows.events import Record, to_time_us
from dataflows.job import Job
from dataflows.learner import Learner
from dataflows.order import Batch, Reader
from dataflows.orderlog import OrderLog
from dataflows.query import ModelState, PastState
from dataflows.replay import SWEEP_EVERY, answer_rows, empties_of, empty_columns, inputs_of
from dataflows.rows import entity_step_names
from dataflows.settings import RunDirectory, Start, read_branches
from dataflows.startup import read_job
from dataflows.state import READER, StateError, Version
from features.parts import FeatureParts
from features.spec import Entity
from features.state import EntityFeatures


def replay(job: Job, run: RunDirectory, begin: str = "start", until: str = "end") -> Iterator[Record]:
    """The records of a part of a run, made again from the state before it, the order log and the inputs.

    With the job as it was they are those of the run, to the last byte; nothing that it predicted is read.

    Parameters
    ----------
    job, run
        The job, and where its run lies.
    begin
        `start`, or what `open_state` takes.
    until
        `end`, a batch (`1-421`), or an event time: then the last batch before a later event.

    Raises `StateError`.
    """
    branch = read_branches(run)[-1]
    end, moment = _limit(until)
    state = ReplayedState(job, run, branch, _manifest_at(job, run, branch, begin))
    try:
        if begin not in ("start", "latest") and str(state.manifest.version) != begin:
            _go_on(state, begin)
        yield from state.records(moment, end)
        if end is not None and state.manifest.batch != end.batch:
            raise StateError(f"batch {end.batch} is not in the order log; the last is {state.manifest.batch}")
    finally:
        state.close()


def _limit(until: str) -> tuple[Version | None, int | None]:
    """The batch or the event time (µs) that a text names; neither for `end`."""
    if until == "end":
        return None, None
    named = _VERSION.fullmatch(until)
    if named is not None:
        return Version(int(named[1]), int(named[2])), None
    try:
        return None, to_time_us(until)
    except ValueError:
        raise StateError(f"--until {until}: neither `end`, a batch such as 1-421, nor a time") from None


def _manifest_at(job: Job, run: RunDirectory, branch: Start, begin: str) -> Manifest:
    """The checkpoint to begin with, on the way to `begin`."""
    if begin == "start":
        if branch.forks:
            raise StateError(f"branch {branch.branch} begins at {branch.forks[-1]}. Hint: --from that checkpoint")
        return Manifest(branch=branch.branch, batch=0, job=read_job(run))
    known = Checkpoints(run)
    named = _VERSION.fullmatch(begin)
    if named is None or any(str(m.version) == begin for m in known.all()):
        try:
            moment = to_time_us(begin)
        except ValueError:
            return known.find(begin)
        return _nearest(run, branch, lambda m: m.clock is None or m.clock <= moment)
    return _nearest(run, branch, lambda m: m.batch <= int(named[2]))


def _go_on(state: ReplayedState, begin: str) -> None:
    """From a checkpoint before it to where a replay begins."""
    end, moment = _limit(begin) if _VERSION.fullmatch(begin) or begin[:1].isdigit() else (None, None)
    if end is not None:
        state.go_to_batch(end.batch)
    elif moment is not None:
        for _ in state.records(until=moment):
            pass


_VERSION = re.compile(r"(\d+)-(\d+)")

Holder = EntityFeatures | FeatureParts


def open_state(job: Job, run: RunDirectory, at: str = "latest") -> PastState:
    """The state of a run at `at`: a checkpoint or savepoint, `latest`, a batch (`1-421`), or an event time.

    As of an event time (ISO text; without a zone: UTC) all events up to it were taken, and none after it. With the
    order `arrival`, where later events may come first, it is the last batch before the first such event.
    Raises `StateError`.
    """
    known = Checkpoints(run)
    if at == "latest" or at in known.savepoints() or any(str(m.version) == at for m in known.all()):
        return PastState.open(job, run, at)
    named = _VERSION.fullmatch(at)
    if named is not None:
        return _at_batch(job, run, Version(int(named[1]), int(named[2])))
    try:
        moment = to_time_us(at)
    except ValueError:
        return PastState.open(job, run, at)  # which says what there is
    return _at_time(job, run, moment)


def _at_batch(job: Job, run: RunDirectory, version: Version) -> PastState:
    branch = next((start for start in read_branches(run) if start.branch == version.branch), None)
    if branch is None:
        return PastState.open(job, run, str(version))  # which says what there is
    state = ReplayedState(job, run, branch, _nearest(run, branch, lambda m: m.batch <= version.batch))
    try:
        if state.manifest.branch == branch.branch and state.manifest.batch > version.batch:
            raise StateError(f"branch {version.branch} begins after batch {version.batch}")
        state.go_to_batch(version.batch)
    except BaseException:
        state.close()
        raise
    return state


def _at_time(job: Job, run: RunDirectory, moment: int) -> PastState:
    branch = _branch_at(run, moment)
    state = ReplayedState(job, run, branch, _nearest(run, branch, lambda m: m.clock is None or m.clock <= moment))
    try:
        state.go_to_time(moment)
    except BaseException:
        state.close()
        raise
    return state


def _branch_at(run: RunDirectory, moment: int) -> Start:
    """Of the branch that goes on and those that it grew from, the one whose log has the events up to then."""
    branches = {start.branch: start for start in read_branches(run)}
    branch = branches[max(branches)]
    clocks = {tuple(m.version): m.clock for m in Checkpoints(run).all()}
    while branch.forks and (clocks.get(branch.forks[-1]) or 0) > moment:
        branch = branches[branch.forks[-1][0]]
    return branch


def _nearest(run: RunDirectory, branch: Start, fits: Any) -> Manifest:
    """The newest checkpoint on the way to a branch's end that fits; else the state before all events."""
    ways = [*branch.forks, (branch.branch, None)]
    found = [
        m
        for m in Checkpoints(run).all()
        if any(m.branch == on and (until is None or m.batch <= until) for on, until in ways) and fits(m)
    ]
    if found:
        return max(found, key=lambda m: m.version)
    if branch.forks:
        raise StateError(f"branch {branch.branch} has no checkpoint before that any more")
    return Manifest(branch=branch.branch, batch=0, job=read_job(run))


class ReplayedState(PastState):
    """All state of a job after some batch, or after some events of one.

    Parameters
    ----------
    job, run
        The job as it is declared now, and where its run lies.
    branch
        Whose batches are worked on.
    manifest
        The checkpoint to begin at.
    """

    def __init__(self, job: Job, run: RunDirectory, branch: Start, manifest: Manifest) -> None:
        super().__init__(job, run, manifest)
        self._admit = super().admit()
        self._publisher = super().publisher()
        self._holders: dict[tuple[int, int], Holder] = {}
        self._learners: dict[int, Learner] = {}
        self._empties = empties_of(job)
        self._branch = branch.branch
        self._left: Batch | None = None  # formed, and not worked on yet
        self._number = manifest.batch  # of the last one that was worked on
        self._log = OrderLog(run.order_log(branch.branch), writable=False)
        self._reader = Reader(inputs_of(job), job.time, log=self._log, rows=self._rows(READER, "read"))

    # -- going on

    def go_to_batch(self, number: int) -> None:
        """Work on the logged batches up to this one. Raises `StateError` where the log ends before."""
        for batch in self._batches():
            self._take(batch)
            if batch.number == number:
                break
        if self._number != number:
            raise StateError(
                f"batch {number} is not in the order log of branch {self._branch}; the last is {self._number}"
            )
        self._describe()

    def go_to_time(self, moment: int) -> None:
        """Work on the logged batches up to an event time (µs)."""
        for batch in self._batches():
            items = batch.items
            later = next((place for place, item in enumerate(items) if item[0] > moment), len(items))
            if later == len(items):
                self._take(batch)
                continue
            if self.job.time.order == "event_time" and later:
                batch.items, batch.end = items[:later], False
                self._take(batch)
            break
        self._describe()

    def records(self, until: int | None = None, end: Version | None = None) -> Iterator[Record]:
        """The records of the batches after it, made again: up to an event time (µs), a batch, or the end of the log."""
        for batch in self._batches():
            if until is not None and any(item[0] > until for item in batch.items):
                self._left = batch
                break
            yield from self._take(batch)
            if end is not None and batch.number == end.batch:
                break
        self._describe()

    def _batches(self) -> Iterator[Batch]:
        if self._left is not None:
            left, self._left = self._left, None
            yield left
        while self._reader.replaying:
            batch = self._reader.next_batch()
            if batch is not None:
                yield batch

    def _take(self, batch: Batch) -> list[Record]:
        """Work on a batch; the records it gives."""
        self._number = batch.number
        work = self._admit.admit(batch)
        answered: dict[int, list[tuple[int, list[int], list[Any]]]] = {}
        for (index, group), rows in work.features.items():
            places, answers = answer_rows(self._holder(index, group), rows)
            for learner in work.learners:
                answered.setdefault(learner, []).append((index, places, answers))
        said = [
            self._learner(group).process(operations, self._columns(work, answered.get(group, [])))
            for group, operations in work.learners.items()
        ]
        if work.number % SWEEP_EVERY == 0 and work.clock is not None:
            for holder in self._holders.values():
                holder.sweep(work.clock)
        return self._publisher.publish(work.rejects, said, work.end)

    def _columns(self, work: Work, answered: list[tuple[int, list[int], list[Any]]]) -> list[list[Any]]:
        columns = empty_columns(self._empties, work.questions)
        for index, places, answers in answered:
            for place, answer in zip(places, answers, strict=True):
                columns[index][place] = answer
        return columns

    def _describe(self) -> None:
        """What there is to know of it, as of a checkpoint."""
        self.manifest = msgspec.structs.replace(
            self.manifest,
            branch=self._branch,
            batch=self._number,
            written_at="",
            clock=self._admit.clock,
            questions=self._admit.questions,
            open=len(self._admit),
            bytes=0,
        )

    def _holder(self, index: int, group: int) -> Holder:
        if (index, group) not in self._holders:
            step = f"features_{entity_step_names(self.job)[index]}"
            self._holders[index, group] = super()._features(step, self.job.entities[index], group)
        return self._holders[index, group]

    # -- what is asked

    def _features(self, step: str, declaration: Entity, group: int) -> Holder:
        names = [f"features_{name}" for name in entity_step_names(self.job)]
        return self._holder(names.index(step), group)

    def _learner(self, group: int) -> Learner:
        if group not in self._learners:
            self._learners[group] = super()._learner(group)
        return self._learners[group]

    def model(self, **entity: Any) -> ModelState | None:
        key, group = self._model_place(entity)
        found = self._learner(group).model(key)
        return None if found is None else ModelState(*found)

    def models(self) -> dict[Any, ModelState]:
        found = super().models()
        for learner in self._learners.values():
            found |= {key: ModelState(*kept) for key in learner.models() if (kept := learner.model(key)) is not None}
        return found

    def admit(self) -> Admit:
        return self._admit

    def publisher(self) -> Publisher:
        return self._publisher

    def close(self) -> None:
        self._reader.close()
        super().close()
