"""Places in the past: what a text names, and state between checkpoints.

Between checkpoints it is that of the nearest one before, and the logged batches after it, worked on again. Nothing of
the run is changed: its order log is read, its inputs are read again, and the state files are only looked at.
"""

from __future__ import annotations

import heapq
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from dataflows.admit import GLOBAL_GROUP, Work
from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.events import Record, to_time_us
from dataflows.job import Job
from dataflows.learner import Learner
from dataflows.order import Batch, Reader
from dataflows.orderlog import LogChain
from dataflows.query import PastState
from dataflows.replay import SWEEP_EVERY, answer_rows, empties_of, empty_columns, inputs_of
from dataflows.rows import entity_step_names
from dataflows.settings import RunDirectory, Start, read_branches
from dataflows.startup import read_job
from dataflows.state import READER, StateError, Version, group_file
from features.parts import FeatureParts
from features.rows import APPEND, GONE, Change, Rows

_VERSION = re.compile(r"(\d+)-(\d+)")


class Place(NamedTuple):
    """A place in the past of a run.

    `branch` is whose batches lead there, `manifest` the nearest checkpoint on the way (batch 0: before all events).
    Behind it the batches up to `batch` are to be worked on, or, where that is None, the events up to `moment` (µs);
    with neither, the place is the checkpoint.
    """

    branch: Start
    manifest: Manifest
    batch: int | None = None
    moment: int | None = None


def find(run: RunDirectory, text: str, on: Start | None = None) -> Place:
    """The place that a text names: `start`, a checkpoint or savepoint, `latest`, a batch (`1-421`), an event time.

    An event time is on the way to a branch, that of the run as it is now if `on` names no other.
    Raises `StateError` for one that is not there.
    """
    branches = {start.branch: start for start in read_branches(run)}
    newest = on or branches[max(branches)]
    if text == "start":
        return Place(newest, Manifest(branch=newest.branch, batch=0, job=read_job(run)))
    known = Checkpoints(run)
    if text == "latest" or text in known.savepoints() or any(str(m.version) == text for m in known.all()):
        manifest = known.find(text)
        return Place(branches[manifest.branch], manifest)
    named = _VERSION.fullmatch(text)
    if named is not None and int(named[1]) in branches:
        version = Version(int(named[1]), int(named[2]))
        branch = branches[version.branch]
        if branch.forks and version.batch <= branch.forks[-1][1]:
            raise StateError(f"branch {version.branch} begins after batch {branch.forks[-1][1]}")
        return Place(branch, _nearest(run, branch, lambda m: m.batch <= version.batch), version.batch)
    try:
        moment = to_time_us(text)
    except ValueError:
        return Place(newest, known.find(text))  # which says what there is
    branch = _branch_at(run, newest, moment)
    return Place(branch, _nearest(run, branch, lambda m: m.clock is None or m.clock <= moment), None, moment)


def known_at(run: RunDirectory, text: str) -> Place:
    """The last batch that was formed at a wall time (ISO text; without a zone: UTC), on the branch that ran then.

    Raises `StateError` for a time before the first batch, or a log that does not know its times.
    """
    try:
        moment = to_time_us(text) // 1000
    except ValueError:
        raise StateError(f"{text!r} is no time. Hint: 2026-04-20T12:00:00Z") from None
    entries = [
        (entry.at, branch.branch, entry.number)
        for branch in read_branches(run)
        if run.order_log(branch.branch).exists()  # a fork has none of the branches before it
        for entry in LogChain([(run.order_log(branch.branch), None)]).after(0)
    ]
    if any(not at for at, _, _ in entries):
        raise StateError(f"the order logs of {run.state} were written before batches had times")
    before = [entry for entry in entries if entry[0] <= moment]
    if not before:
        first = f"; the first came {_wall(entries[0][0])}" if entries else ""
        raise StateError(f"the job had taken nothing yet at {text}{first}")
    _, branch, number = max(before)
    return find(run, f"{branch}-{number}")


def _wall(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds")


def last_batch(job: Job, run: RunDirectory, place: Place) -> int:
    """The number of the last batch up to a place; of an event time, the last one before a later event."""
    if place.moment is None and place.batch is None:
        return place.manifest.batch
    if place.moment is None:
        last = max(
            (e.number for e in chain(run, place.branch, place.batch).after(place.manifest.batch)),
            default=place.manifest.batch,
        )
        if last != place.batch:
            raise StateError(f"batch {place.batch} is not in the order log; the last is {last}")
        return last
    state = ReplayedState(job, run, place)
    try:
        return state.last_before(place.moment)
    finally:
        state.close()


def open_state(job: Job, run: RunDirectory, at: str = "latest", known: str | None = None) -> PastState:
    """The state of a run at `at`: what `find` takes.

    As of an event time (ISO text; without a zone: UTC) all events up to it were taken, and none after it. With the
    order `arrival`, where later events may come first, it is the last batch before the first such event. `known` is a
    wall time: with `at="latest"` the state as it was then; with an event time, what the job had learned by then of the
    events up to `at`.
    Raises `StateError`.
    """
    if known is not None:
        return _open_known(job, run, at, known)
    if at == "latest":
        return PastState.open(job, run, at)
    place = find(run, at)
    if place.batch is None and place.moment is None and place.manifest.batch:
        return PastState.open(job, run, at)
    return _replayed(job, run, place)


def _open_known(job: Job, run: RunDirectory, at: str, known: str) -> PastState:
    place = known_at(run, known)
    if at != "latest":
        asked = find(run, at)
        if asked.moment is None:
            raise StateError(f"{at} is one batch, whatever was known when. Hint: an event time, or one of the two only")
        moment, last = asked.moment, last_batch(job, run, place)
        early = _nearest(run, place.branch, lambda m: m.batch <= last and (m.clock or 0) <= moment)
        place = Place(place.branch, early, last, moment)
    return _replayed(job, run, place) if place.batch is not None else PastState(job, run, place.manifest)


def _replayed(job: Job, run: RunDirectory, place: Place) -> PastState:
    state = ReplayedState(job, run, place)
    try:
        state.go_on()
    except BaseException:
        state.close()
        raise
    return state


def chain(run: RunDirectory, branch: Start, until: int | None = None) -> LogChain:
    """The order logs on the way to a branch."""
    ways = [*branch.forks, (branch.branch, None)]
    return LogChain([(run.order_log(each), last) for each, last in ways], until)


def _branch_at(run: RunDirectory, branch: Start, moment: int) -> Start:
    """Of a branch and those that it grew from, the one whose log has the events up to then."""
    branches = {start.branch: start for start in read_branches(run)}
    clocks = {tuple(m.version): m.clock for m in Checkpoints(run).all()}
    while branch.forks and (clocks.get(branch.forks[-1]) or 0) > moment:
        branch = branches[branch.forks[-1][0]]
    return branch


def _nearest(run: RunDirectory, branch: Start, fits: Callable[[Manifest], bool]) -> Manifest:
    """The newest checkpoint on the way to a branch's end that fits; else the state before all events."""
    ways = [*branch.forks, (branch.branch, None)]
    found = [
        m
        for m in Checkpoints(run).all()
        if any(m.branch == on and (until is None or m.batch <= until) for on, until in ways) and fits(m)
    ]
    if found:
        return max(found, key=lambda m: m.version)
    return Manifest(branch=branch.branch, batch=0, job=read_job(run))


class ReplayedState(PastState):
    """All state of a job at a place between checkpoints.

    Parameters
    ----------
    job, run
        The job as it is declared now, and where its run lies.
    place
        The checkpoint to begin at, and where to go.
    """

    def __init__(self, job: Job, run: RunDirectory, place: Place) -> None:
        super().__init__(job, run, place.manifest)
        try:
            self._place = place
            self._over: dict[tuple[str, str], LaidOver] = {}
            self._holders: dict[tuple[int, int], FeatureParts] = {}
            self._learners: dict[int, Learner] = {}
            self._empties = empties_of(job)
            self._number = place.manifest.batch  # of the last one that was worked on
            log = chain(run, place.branch, place.batch)
            self._reader = Reader(inputs_of(job), job.time, log=log, rows=self._rows(READER, "read"))
        except BaseException:
            super().close()
            raise

    def go_on(self) -> None:
        """Work on the logged batches up to the place. Raises `StateError` where the log ends before."""
        self._begin()
        moment = self._place.moment
        for batch in self._batches():
            if moment is None or all(item[0] <= moment for item in batch.items):
                self._take(batch)
                continue
            later = next(place for place, item in enumerate(batch.items) if item[0] > moment)
            if self.job.time.order == "event_time" and later:
                batch.items, batch.end = batch.items[:later], False
                self._take(batch)
            break
        wanted = self._place.batch
        if moment is None and wanted is not None and self._number != wanted:
            raise StateError(
                f"batch {wanted} is not in the order log of branch {self._place.branch.branch}; "
                f"the last is {self._number}"
            )
        self._settle()

    def records(self) -> Iterator[Record]:
        """The records of the batches after the checkpoint, to the end of the log, or to the batch of the place."""
        self._begin()
        for batch in self._batches():
            yield from self._take(batch)

    def last_before(self, moment: int) -> int:
        """The number of the last batch before one that has a later event; the inputs are read for it."""
        number = self._number
        for batch in self._batches():
            if any(item[0] > moment for item in batch.items):
                break
            number = batch.number
        return number

    def _begin(self) -> None:
        """Not before it is needed: to look for a place only the inputs are read."""
        self._admit = self.admit()
        self._publisher = self.publisher()

    def _batches(self) -> Iterator[Batch]:
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
            self._learner_of(group).process(operations, self._columns(work, answered.get(group, [])))
            for group, operations in work.learners.items()
        ]
        if work.number % SWEEP_EVERY == 0 and work.clock is not None:
            for holder in self._holders.values():
                holder.sweep(work.clock)
        return self._publisher.publish(work.rejects, said, work.end)

    def _learner_of(self, group: int) -> Learner:
        if group not in self._learners:
            self._learners[group] = self._learner(group)
        return self._learners[group]

    def _columns(self, work: Work, answered: list[tuple[int, list[int], list[Any]]]) -> list[list[Any]]:
        columns = empty_columns(self._empties, work.questions)
        for index, places, answers in answered:
            for place, answer in zip(places, answers, strict=True):
                columns[index][place] = answer
        return columns

    def _settle(self) -> None:
        """Have all that is asked of a checkpoint be answered as of now: what changed lies over its rows."""
        self._apply(READER, "read", self._reader.changes())
        self._apply(READER, "admit", self._admit.changes())
        self._apply(group_file(GLOBAL_GROUP % self._groups), "publish", self._publisher.changes())
        for group, learner in self._learners.items():
            self._apply(group_file(group), "learner", learner.changes())
        for (index, group), holder in self._holders.items():
            step = f"features_{entity_step_names(self.job)[index]}"
            for part, features in zip(self.layout.features[step], holder.parts, strict=True):
                self._apply(group_file(group), part.rows, features.changes())
        self.manifest = msgspec.structs.replace(
            self.manifest,
            branch=self._place.branch.branch,
            batch=self._number,
            written_at="",
            clock=self._admit.clock,
            questions=self._admit.questions,
            open=len(self._admit),
            bytes=0,
        )

    def _apply(self, file: str, step: str, changes: Iterable[Change]) -> None:
        self._over[file, step] = LaidOver(super()._rows(file, step), changes)

    def _rows(self, file: str, step: str) -> Any:
        return self._over.get((file, step)) or super()._rows(file, step)

    def _holder(self, index: int, group: int) -> FeatureParts:
        if (index, group) not in self._holders:
            step = f"features_{entity_step_names(self.job)[index]}"
            self._holders[index, group] = self._features(step, self.job.entities[index], group)
        return self._holders[index, group]

    def close(self) -> None:
        self._reader.close()
        super().close()


class LaidOver:
    """Rows with changes over them (`features.rows.Rows`); what they give is new each time, as from the store.

    >>> from features.rows import MemoryRows, put
    >>> rows = MemoryRows()
    >>> rows.apply([put("a", 1), put("b", 2)])
    >>> over = LaidOver(rows, [put("b", 3), ("a", GONE, b""), put("c", 4)])
    >>> list(over.scan("")), over.get("a"), over.count(), over.empty()
    ([('b', [3]), ('c', [4])], [], 2, False)
    """

    def __init__(self, rows: Rows, changes: Iterable[Change]) -> None:
        self._rows = rows
        self._changed: dict[str, list[bytes]] = {}  # what is new of a row
        self._added: set[str] = set()  # those whose old parts stay before that
        for key, kind, part in changes:
            if kind == APPEND and key not in self._changed:
                self._added.add(key)
            elif kind != APPEND:
                self._added.discard(key)
            before = self._changed.get(key, []) if kind == APPEND else []
            self._changed[key] = before if kind == GONE else [*before, part]

    def get(self, key: str) -> list[Any]:
        """The parts of a row; empty when there is none."""
        kept = self._rows.get(key) if key in self._added or key not in self._changed else []
        return [*kept, *map(pickle.loads, self._changed.get(key, ()))]

    def scan(self, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        """The rows whose keys begin with `prefix`, in the order of their keys."""
        there = (key for key in sorted(self._changed) if key.startswith(prefix))
        changed = ((key, parts) for key in there if (parts := self.get(key)))
        kept = ((key, parts) for key, parts in self._rows.scan(prefix) if key not in self._changed)
        return heapq.merge(kept, changed, key=itemgetter(0))

    def count(self) -> int:
        """How many rows there are."""
        return sum(1 for _ in self.scan(""))

    def empty(self) -> bool:
        """Whether there are no rows at all."""
        return next(self.scan(""), None) is None
