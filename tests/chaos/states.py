"""All that a job holds, in plain objects: at a checkpoint, and in a run without engine and checkpoints."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from dataflows.admit import Admit
from dataflows.checkpoints import Manifest
from dataflows.evaluate import Publisher
from dataflows.job import KINDS, Job
from dataflows.learner import Learner
from dataflows.order import Reader
from dataflows.orderlog import LogEntry, OrderLog
from dataflows.query import PastState, Question
from dataflows.replay import answer_rows, empties_of, empty_columns, entity_features, inputs_of
from dataflows.rows import entity_step_names
from dataflows.settings import RunDirectory
from features.rows import MemoryRows
from features.state import EntityFeatures, EntityState
from tests.chaos.sameness import difference

State = dict[str, Any]
"""By holder; under `entities` by step and key, under `models` by key, under `open` by number."""


def state_at(job: Job, run: RunDirectory, manifest: Manifest) -> State:
    """What a checkpoint has."""
    past = PastState(job, run, manifest)
    try:
        steps = [part.rows for parts in past.layout.features.values() for part in parts]
        clock = past.clock
        return {
            "reader": _reader_rows(past.reader()),
            "admit": _admit(past.admit()),
            "entities": {step: Entities(job, step, clock, dict(past.entities(step))) for step in steps},
            "models": _models({key: tuple(model) for key, model in past.models().items()}),
            "open": {question.number: question for question in past.open_questions()},
            "publisher": _publisher(past.publisher()),
        }
    finally:
        past.close()


def state_difference(one: State, other: State) -> str | None:
    """Where two states differ first, in words."""
    for holder in one:
        if holder == "entities":
            found = _first(ours.difference(other[holder][step]) for step, ours in one[holder].items())
        else:
            # Of the others dicts have no order that could change a result, or were put in order here.
            found = difference(one[holder], other[holder], ordered=holder in ("models", "open"))
        if found is not None:
            return f"{holder}{found}"
    return None


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


class Entities:
    """The entities of a feature step.

    Parameters
    ----------
    job
        Whose they are.
    step
        The step's name.
    clock
        The newest event time (µs). Entities that equal one never seen from then on may be there or not.
    states
        By key.
    """

    def __init__(self, job: Job, step: str, clock: int, states: dict[Any, EntityState]) -> None:
        declaration = job.entities[[f"features_{name}" for name in entity_step_names(job)].index(step)]
        self._step = step
        self._clock = clock
        self._windows = declaration.over
        self._forget_after = declaration.forget_after_us
        self._lateness = job.time.lateness if job.time.order == "arrival" else 0
        self._asked = entity_features(job, declaration)
        self.states = {key: state for key, state in states.items() if not self._is_forgotten(state)}

    def difference(self, other: Entities) -> str | None:
        """Where the states differ first, in words."""
        keys, others = (sorted(each.states, key=repr) for each in (self, other))
        if keys != others:
            return f"[{self._step}]: entities {sorted(set(keys) ^ set(others), key=repr)[:5]} are on one side only"
        pairs = ((key, self.states[key], other.states[key]) for key in keys)
        return _first(self._difference(key, ours, theirs) for key, ours, theirs in pairs)

    def _difference(self, key: Any, one: EntityState, other: EntityState) -> str | None:
        found = difference(_held(one), _held(other))
        # One that came back after a long pause may have been let go meanwhile, or still have what it can tell nobody.
        if found is not None and (self._forget_after is None or self._answers(one) != self._answers(other)):
            return f"[{self._step}][{key!r}]{found}"
        return None

    def _answers(self, state: EntityState) -> list[str]:
        """What it answers from now on, at and between all moments at which an event may leave a window."""
        assert self._forget_after is not None
        known = [] if state.history is None else list(state.history.times)[-40:]
        reaches = {reach for over in self._windows for reach in (over.reach_us,) if reach is not None}
        moments = {time + reach + step for time in known for reach in reaches for step in (-1, 0, 1)}
        first, last = self._clock - self._lateness, self._clock + self._forget_after
        moments |= {first + (last - first) * i // 60 for i in range(61)}
        self._asked._young = {"": state}
        return [repr(self._asked.read("", t)) for t in sorted(moments) if t >= first]

    def _is_forgotten(self, state: EntityState) -> bool:
        if self._forget_after is None or state.last_seen is None:
            return False
        return state.last_seen < self._clock - self._forget_after - self._lateness


def _held(state: EntityState) -> tuple[Any, ...]:
    """Without what it knows of how it is kept."""
    return state.last_seen, state.history, state.folds


def output_difference(one: Path, other: Path, kinds: Collection[str] = KINDS, ordered: bool = True) -> str | None:
    """The first line in which the outputs of two runs differ; not `ordered`: in which order lines come is all one."""
    for kind in kinds:
        ours, theirs = (_lines(directory / f"{kind}.jsonl") for directory in (one, other))
        if not ordered:
            ours.sort()
            theirs.sort()
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            what = f"{ours[at]!r} is not {theirs[at]!r}" if at >= 0 else ""
            return f"{kind} of {one} and {other}: {len(ours)} and {len(theirs)} lines; line {at + 1}: {what}"
    return None


def log_fault(log: Path, lines: dict[str, int]) -> str | None:
    """What is wrong with an order log that should have every record of some files once, and every batch."""
    entries = [msgspec.json.decode(line, type=LogEntry) for line in _lines(log)]
    numbers = [entry.number for entry in entries]
    if numbers != list(range(1, len(numbers) + 1)):
        return f"the order log has the batches {numbers}"
    for name, count in lines.items():
        pulled = sum(n for entry in entries for file, n in entry.pulls if file == name and n > 0)
        if pulled != count:
            return f"the order log has {pulled} records of {name}, the file has {count}"
    return None


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


# -- a run without engine and checkpoints


class PlainRun:
    """The batches of an order log, one after the other, in this process; nothing is ever saved or restored.

    Unlike `Job.play` it has key groups, so that what is held says the same of them.
    """

    def __init__(self, job: Job, log: Path, groups: int) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        copied = Path(self._scratch.name) / "order.log"
        shutil.copyfile(log, copied)
        self._job = job
        self._reader = Reader(inputs_of(job), job.time, log=OrderLog(copied))
        self._admit = Admit(job, groups, MemoryRows())  # rows: so that it keeps what is kept for people to ask
        self._features: dict[tuple[int, int], EntityFeatures] = {}
        self._learners: dict[int, Learner] = {}
        self._publisher = Publisher(job)
        self._empties = empties_of(job)

    def states(self, batches: Collection[int]) -> Iterator[tuple[int, State]]:
        """The state after each of some batches (but for the reader, who may have read on)."""
        wanted = set(batches)
        if 0 in wanted:
            yield 0, self._state()
        while wanted and max(wanted) > self._reader.number and self._reader.replaying:
            self._step()
            if self._reader.number in wanted:
                yield self._reader.number, self._state()

    def close(self) -> None:
        """Give the inputs up."""
        self._reader.close()
        self._scratch.cleanup()

    def _step(self) -> None:
        batch = self._reader.next_batch()
        assert batch is not None
        work = self._admit.admit(batch)
        parts: dict[int, list[tuple[int, list[int], list[Any]]]] = {}
        for place, rows in work.features.items():
            if place not in self._features:
                self._features[place] = entity_features(self._job, self._job.entities[place[0]])
            places, answers = answer_rows(self._features[place], rows)
            for group in work.learners:
                parts.setdefault(group, []).append((place[0], places, answers))
        said = []
        for group, operations in work.learners.items():
            columns = empty_columns(self._empties, work.questions)
            for index, places, answers in parts.get(group, ()):
                for at, answer in zip(places, answers, strict=True):
                    columns[index][at] = answer
            learner = self._learners.setdefault(group, Learner(self._job))
            said.append(learner.process(operations, columns))
        self._publisher.publish(work.rejects, said, work.end)

    def _state(self) -> State:
        entities: dict[str, dict[Any, EntityState]] = {f"features_{name}": {} for name in entity_step_names(self._job)}
        steps = list(entities)
        for (index, _), features in self._features.items():
            entities[steps[index]] |= features._young | features._old
        clock = self._admit.clock or 0
        models: dict[Any, Any] = {}
        questions: dict[int, Question] = {}
        names = self._job.feature_names
        for learner in self._learners.values():
            models |= {key: (m.model, m.name, m.version) for key, m in learner._models.items()}
            for number, (id, at, kept, output, _, version, _) in learner.open_questions():
                features_kept = dict(zip(names, kept, strict=True)) if type(kept) is tuple else kept or {}
                questions[number] = Question(number, id, at, features_kept, output, version)
        return {
            "admit": _admit(self._admit),
            "entities": {step: Entities(self._job, step, clock, states) for step, states in entities.items()},
            "models": _models(models),
            "open": {number: questions[number] for number in sorted(questions)},
            "publisher": _publisher(self._publisher),
        }


# -- what holders hold, without what depends on when it was written


def _admit(admit: Admit) -> State:
    open_ = admit._open
    due = admit._due
    early = admit._early
    return {
        "counts": dict(admit.counts),
        "clock": admit.clock,
        "questions": admit.questions,
        "open": [(number, open_[number]) for number in sorted(open_)],
        "waiting": _sorted(admit._waiting),
        # What was answered meanwhile is passed over when it falls due, and is not there after a resume.
        "due": sorted(entry for entry in (*due._line, *due._heap) if entry[1] in open_),
        "targets": _sorted(
            {
                key: left
                for key, waiting in admit._targets.items()
                if (left := sorted(entry for entry in waiting if entry[1] in open_))
            }
        ),
        # In their order; the numbers themselves begin again after those that wait when they are read back.
        "early": [(match, e[:5]) for match, e in sorted(early.entries.items(), key=lambda entry: entry[1][5])],
        "remembered": [
            (list(each.numbers.items()), _sorted(each._values)) for each in (admit._ids, admit._closed, admit._models)
        ],
    }


def _models(models: dict[Any, Any]) -> dict[Any, Any]:
    """Those that have learned: one that has not is as good as none."""
    return _sorted({key: model for key, model in models.items() if model[2]})


def _publisher(publisher: Publisher) -> State:
    publisher.evaluator.values()  # a metric may wait with its sums until it is read, and people read it at any time
    return {
        "counts": dict(publisher.counts),
        "reported": publisher._reported,
        "evaluator": publisher.evaluator.state(),
    }


def _reader_rows(rows: dict[str, list[Any]]) -> State:
    """Items are numbered when they are written, so they are told by their place in the input."""
    if not rows:
        return {}
    state: dict[str, Any] = dict(rows["reader"][0])
    masks = {key.removeprefix("item-mask/"): parts[0] for key, parts in rows.items() if key.startswith("item-mask/")}
    items: dict[int, Any] = {}
    for key, parts in rows.items():
        if key.startswith("item/"):
            start, mask = parts[0][0][0], masks.get(key.removeprefix("item/"))
            items |= {n: item for n, item in parts[0] if mask is None or mask >> (n - start) & 1}
    del state["newest_item"]
    state["ready"] = [items[number][1:3] for number in state["ready"]]
    state["items"] = sorted(items.values(), key=lambda item: item[1:3])
    # In which order the inputs were pulled since the last batch; and of a file, how much was there when it was opened.
    pulled: dict[str, int] = {}
    for name, count in state.pop("pulls"):
        pulled[name] = pulled.get(name, 0) + max(count, 0)
    state["pulled"] = _sorted(pulled)
    state["lanes"] = _sorted({name: (tuple(at)[:2], *rest) for name, (at, *rest) in state["lanes"].items()})
    return state


def _sorted(values: dict[Any, Any], key: Callable[[Any], Any] = repr) -> dict[Any, Any]:
    return {name: values[name] for name in sorted(values, key=key)}
