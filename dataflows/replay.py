"""The same logic without an engine: a plain loop over reader, admit, features, learner and publisher.

`Job.play` runs it in notebooks and tests; the backtest runs it over history. What the Bytewax flow spreads over workers
is here one after the other, with the same classes, so the results are the same to the last bit.
"""

from __future__ import annotations

import pickle
import time as wall
from collections.abc import Iterable, Iterator
from typing import Any

from dataflows.admit import Admit, Row, Work
from dataflows.bundle import Bundle, Part, Warm, models_of
from dataflows.changes import declared, first_layout
from dataflows.connectors.memory import Memory
from dataflows.evaluate import Publisher
from dataflows.events import Raw, Record
from dataflows.job import Job
from dataflows.learner import Columns, Learner
from dataflows.order import EVENT, LABEL, Reader, Source
from dataflows.rows import entity_step_names
from dataflows.settings import FeaturePart
from features.parts import FeatureParts
from features.rows import APPEND, PUT, MemoryRows, Rows, key_text
from features.spec import Entity
from features.state import EntityFeatures

SWEEP_EVERY = 64
"""Batches between two sweeps of entities past their TTL; results do not depend on it, only memory does."""


def inputs_of(
    job: Job, events: Iterable[Raw] | None = None, labels: Iterable[Raw] | None = None
) -> list[tuple[int, Source]]:
    """A job's inputs by kind; iterables take the place of declared sources."""
    source: Source = job.events if events is None else Memory(event=job.events.event, items=events, name="events")
    inputs: list[tuple[int, Source]] = [(EVENT, source)]
    if job.label.source is not None:
        if events is not None and labels is None:
            raise ValueError("this job's labels are a stream of their own. Hint: job.play(events, labels)")
        declared = job.label.source
        inputs.append(
            (LABEL, declared if labels is None else Memory(event=declared.event, items=labels, name="labels"))
        )
    elif labels is not None:
        raise ValueError("this job finds its labels in its events. Hint: job.play(events)")
    return inputs


def entity_features(job: Job, declaration: Entity, rows: Rows | None = None, cache: int = 1_000_000) -> EntityFeatures:
    """The state of one Entity declaration of a job; see `EntityFeatures` for `rows` and `cache`."""
    lateness = job.time.lateness if job.time.order == "arrival" else 0
    return EntityFeatures(declaration, lateness, job.trusted_columns, rows, cache)


def answer_rows(features: EntityFeatures | FeatureParts, rows: list[Row]) -> tuple[list[int], list[Any]]:
    """Carry out a batch's rows in order: the places of its questions, and their feature values or what is wrong."""
    places: list[int] = []
    answers: list[Any] = []
    ask, read, observe = features.ask, features.read, features.observe
    for place, key, time, values in rows:
        if place < 0:
            observe(key, time, values)  # type: ignore[arg-type]
            continue
        answer: Any
        try:
            answer = read(key, time) if values is None else ask(key, time, values)
        except (TypeError, ValueError, OverflowError) as error:
            answer = f"{type(error).__name__}: {error}"
        places.append(place)
        answers.append(answer)
    return places, answers


def empty_columns(empties: list[tuple[Any, ...]], questions: int) -> Columns:
    """Columns for a batch, filled with what an entity that was never seen gives."""
    return [[empty] * questions for empty in empties]


def empties_of(job: Job) -> list[tuple[Any, ...]]:
    """By entity declaration: the features of an entity that was never seen."""
    return [entity_features(job, entity).read("", 0) for entity in job.entities]


class _Begun:
    """The features of a step as a bundle has them, in as many parts."""

    def __init__(self, job: Job, entity: Entity, parts: list[Part]) -> None:
        self._parts = [(part, _in_memory(part), declared(_part(part), job)) for part in parts]
        self._features = [entity_features(job, each, rows) for _, rows, each in self._parts]
        self.features = FeatureParts(entity, list(zip(self._features, (part[0] for part in parts), strict=True)))

    def kept(self) -> list[Part]:
        """As a bundle keeps them, as they are now."""
        for features, (_, rows, _) in zip(self._features, self._parts, strict=True):
            rows.apply(features.changes())
        return [(names, text, dict(rows.scan(""))) for (names, text, _), rows, _ in self._parts]


def _part(part: Part) -> FeaturePart:
    return FeaturePart(rows="", names=part[0], declaration=part[1])


def _in_memory(part: Part) -> MemoryRows:
    rows = MemoryRows()
    for key, some in part[2].items():
        rows.apply((key, APPEND if place else PUT, pickle.dumps(each, 5)) for place, each in enumerate(some))
    return rows


class PlainRun:
    """One job in one process without an engine.

    With a bundle it begins with those models and features.
    `run` yields records; `admit`, `learner`, `features` and `publisher` may be looked at at any time.
    """

    def __init__(self, job: Job, reader: Reader, bundle: Bundle | None = None) -> None:
        self.reader = reader
        try:
            self._begin(job, bundle)
        except BaseException:
            reader.close()
            raise

    def _begin(self, job: Job, bundle: Bundle | None) -> None:
        self.admit = Admit(job)
        names = [f"features_{name}" for name in entity_step_names(job)]
        kept: dict[str, list[Part]] = {}
        if bundle is not None:
            self.admit.begin_at(bundle.about.get("clock") if bundle.features else None)
            new = first_layout(job).features
            kept = {step: [(part.names, part.declaration, {}) for part in parts] for step, parts in new.items()}
            kept |= bundle.features
        named = list(zip(names, job.entities, strict=True))
        self._begun = {name: _Begun(job, entity, kept[name]) for name, entity in named if name in kept}
        self.features: list[EntityFeatures | FeatureParts] = [
            self._begun[name].features if name in self._begun else entity_features(job, entity)
            for name, entity in named
        ]
        self.learner = Learner(job, warm=models_of(job) if bundle is None else bundle.models)
        self.publisher = Publisher(job)
        self._empties = empties_of(job)

    def bundle(self, before: Bundle) -> tuple[Warm, dict[str, list[Part]]]:
        """The models and the features as they are now, of a run that began with a bundle."""
        now = {key_text(key): (pickle.dumps(model, 5), count) for key, (model, count) in self.learner.models().items()}
        return before.models | now, {step: begun.kept() for step, begun in self._begun.items()}

    def run(self) -> Iterator[Record]:
        """All records, batch by batch, until the inputs end."""
        reader = self.reader
        try:
            while not reader.finished:
                batch = reader.next_batch()
                if batch is not None:
                    yield from self.process(self.admit.admit(batch))
                elif not reader.finished:
                    wall.sleep(0.001)
        finally:
            reader.close()

    def process(self, work: Work) -> Iterator[Record]:
        """The records of one batch."""
        columns = empty_columns(self._empties, work.questions)
        for (index, _), rows in work.features.items():
            column = columns[index]
            for place, answer in zip(*answer_rows(self.features[index], rows), strict=True):
                column[place] = answer
        if work.number % SWEEP_EVERY == 0 and work.clock is not None:
            for features in self.features:
                features.sweep(work.clock)
        said = [self.learner.process(operations, columns) for operations in work.learners.values()]
        yield from self.publisher.publish(work.rejects, said, work.end)


def play(job: Job, events: Iterable[Raw] | None = None, labels: Iterable[Raw] | None = None) -> Iterator[Record]:
    """See `Job.play`."""
    return PlainRun(job, Reader(inputs_of(job, events, labels), job.time)).run()
