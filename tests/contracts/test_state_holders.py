"""The contract of whatever holds state: it pickles, resumes identically, and being looked at changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import linear_model, metrics, preprocessing, utils

from dataflows import Event, Job, Label, Report, Time
from dataflows.admit import Admit, Work
from dataflows.connectors import Memory
from dataflows.evaluate import Publisher
from dataflows.learner import Learner
from dataflows.order import EVENT, LABEL, Batch, Reader
from dataflows.replay import answer_rows, empties_of, empty_columns, entity_features
from features import Count, Entity, Fields, Last, Mean, NUnique, Tumbling
from features.state import EntityFeatures


class Sale(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    card: str
    amount: float


class Verdict(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: bool


JOB = Job(
    name="contract",
    events=Memory(event=Sale, items=[]),
    features=[
        Fields("amount"),
        Entity("card", [Count(), Mean("amount")], over=[20, Last(3), "lifetime"]),
        Entity("card", [NUnique("amount")], over=Tumbling(10), name="card_tumbling"),
        Entity("card", [Count(), Mean("y")], over=15, of="labels", name="label"),
    ],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(Memory(event=Verdict, items=[]), field="y", horizon=30, otherwise=False, early=20, max_open=7),
    metrics=[metrics.ROCAUC(), utils.Rolling(metrics.LogLoss, window_size=5)],
    report=Report(outcomes=4),
    time=Time(lateness=3),
    max_ids=20,
)

Rows = list[dict[str, Any]]
CARDS = st.sampled_from("ab")


@st.composite
def streams(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Events and labels with duplicates, ties, late and early ones, orphans."""
    events = [
        {"id": draw(st.integers(0, 30)), "t": t + draw(st.integers(0, 3)), "card": draw(CARDS), "amount": amount}
        for t, amount in enumerate(draw(st.lists(st.floats(0, 9), min_size=1, max_size=30)))
    ]
    labels = [
        {"id": draw(st.integers(0, 35)), "t": t, "y": draw(st.booleans())}
        for t in sorted(draw(st.lists(st.integers(0, 60), max_size=20)))
    ]
    return events, labels


def reader(rows: tuple[Rows, Rows], state: Any = None) -> Reader:
    """A reader in small batches, so that there are many places to stop at."""
    events, labels = rows
    skip: dict[str, int] = {name: lane[0] for name, lane in (state or {}).get("lanes", {}).items()}
    inputs = [
        (EVENT, Memory(event=Sale, items=events[skip.get("events", 0) :], name="events")),
        (LABEL, Memory(event=Verdict, items=labels[skip.get("labels", 0) :], name="labels")),
    ]
    return Reader(inputs, JOB.time, batch_size=4, state=state)


def batches(rows: tuple[Rows, Rows]) -> list[Batch]:
    """What the reader makes of a stream."""
    source, taken = reader(rows), []
    while not source.finished:
        batch = source.next_batch()
        if batch is not None:
            taken.append(batch)
    return taken


def works(rows: tuple[Rows, Rows]) -> list[Work]:
    """What admit makes of it."""
    admit = Admit(JOB)
    return [admit.admit(batch) for batch in batches(rows)]


def spoken(rows: tuple[Rows, Rows]) -> list[tuple[Work, list[Any]]]:
    """What learners said of each batch."""
    learner = Learner(JOB)
    features = [entity_features(JOB, i) for i in range(len(JOB.entities))]
    said = []
    for work in works(rows):
        columns = columns_of(work, features)
        said.append((work, [learner.process(operations, columns) for operations in work.learners.values()]))
    return said


def columns_of(work: Work, features: Sequence[EntityFeatures]) -> Any:
    """The features of the questions of one batch."""
    columns = empty_columns(empties_of(JOB), work.questions)
    for (index, _), asked in work.features.items():
        for place, answer in zip(*answer_rows(features[index], asked), strict=True):
            columns[index][place] = answer
    return columns


def described(work: Work) -> Any:
    """All that a Work says."""
    return work.number, work.questions, work.features, work.learners, work.reads, work.rejects, work.clock, work.end


@dataclass
class Holder:
    """How one holder of state is built, fed step by step, and what may be read of it without changing it."""

    steps: Callable[[tuple[Rows, Rows]], Sequence[Any]]
    build: Callable[[Any], Any]
    feed: Callable[[Any, Any], Any]
    snapshot: Callable[[Any], Any]
    look: Callable[[Any], Any]


def entity_build(index: int) -> Callable[[Any], EntityFeatures]:
    """Builds the features of one declaration, empty or restored."""

    def build(state: Any) -> EntityFeatures:
        features = entity_features(JOB, index)
        if state is not None:
            features.restore(state)
        return features

    return build


def entity_feed(index: int) -> Callable[[EntityFeatures, Work], Any]:
    """Feeds them their rows of a batch."""
    return lambda features, work: answer_rows(features, work.features.get((index, 0), []))


def learner_feed(learner: Learner, step: tuple[Work, Any]) -> Any:
    """Feeds a learner the operations of a batch."""
    work, columns = step
    return [learner.process(operations, columns) for operations in work.learners.values()]


def learner_steps(rows: tuple[Rows, Rows]) -> list[tuple[Work, Any]]:
    """Batches with the features that their questions need."""
    features = [entity_features(JOB, i) for i in range(len(JOB.entities))]
    return [(work, columns_of(work, features)) for work in works(rows)]


HOLDERS = {
    "Admit": Holder(
        batches,
        lambda state: Admit(JOB, 1, state),
        lambda admit, batch: described(admit.admit(batch)),
        lambda admit: admit.snapshot(),
        lambda admit: (len(admit), dict(admit.counts)),
    ),
    "Learner": Holder(
        learner_steps,
        lambda state: Learner(JOB, state),
        learner_feed,
        lambda learner: learner.snapshot(),
        lambda learner: (len(learner), {k: v for k, (_, v) in learner.models().items()}),
    ),
    "Publisher": Holder(
        spoken,
        lambda state: Publisher(JOB, state),
        lambda publisher, step: list(publisher.publish(step[0].rejects, step[1], step[0].end)),
        lambda publisher: publisher.snapshot(),
        lambda publisher: (publisher.evaluator.values(), publisher.evaluator.now(), dict(publisher.counts)),
    ),
} | {
    f"EntityFeatures {entity.label}": Holder(
        works,
        entity_build(index),
        entity_feed(index),
        lambda features: features.snapshot(),
        lambda features: ([features.read(card, t) for card in "abz" for t in (40, 100)], len(features)),
    )
    for index, entity in enumerate(JOB.entities)
}

EACH = pytest.mark.parametrize("name", HOLDERS)


@EACH
@settings(max_examples=30)
@given(rows=streams(), cut=st.integers(0, 12))
def test_it_resumes_identically(name: str, rows: tuple[Rows, Rows], cut: int) -> None:
    """Built from a snapshot that went through bytes, it says of all later steps what the original says."""
    holder = HOLDERS[name]
    first = holder.build(None)
    steps = holder.steps(rows)
    for step in steps[:cut]:
        holder.feed(first, step)
    state = pickle.dumps(holder.snapshot(first))
    resumed = holder.build(pickle.loads(state))
    assert holder.look(resumed) == holder.look(first)
    # Steps are made anew for each, so that neither can lean on objects that the other changed.
    found = [holder.feed(resumed, step) for step in holder.steps(rows)[cut:]]
    assert repr(found) == repr([holder.feed(first, step) for step in steps[cut:]])
    assert holder.look(resumed) == holder.look(first)


@EACH
@settings(max_examples=30)
@given(rows=streams())
def test_looking_at_it_and_snapshots_change_nothing(name: str, rows: tuple[Rows, Rows]) -> None:
    """With a look and a snapshot after every step it says what it says without."""
    holder = HOLDERS[name]
    watched, alone = holder.build(None), holder.build(None)
    expected = [holder.feed(alone, step) for step in holder.steps(rows)]
    found = []
    for step in holder.steps(rows):
        found.append(holder.feed(watched, step))
        assert holder.look(watched) == holder.look(watched)
        pickle.dumps(holder.snapshot(watched))
    assert repr(found) == repr(expected)


@EACH
@settings(max_examples=20)
@given(rows=streams())
def test_two_of_them_share_nothing(name: str, rows: tuple[Rows, Rows]) -> None:
    """One that was fed leaves a new one as empty as ever."""
    holder = HOLDERS[name]
    empty = holder.look(holder.build(None))
    fed = holder.build(None)
    for step in holder.steps(rows):
        holder.feed(fed, step)
    assert holder.look(holder.build(None)) == empty


@settings(max_examples=40)
@given(rows=streams(), cut=st.integers(0, 12))
def test_a_reader_resumes_identically(rows: tuple[Rows, Rows], cut: int) -> None:
    """The items after a snapshot are those that reading on gives; looking at it changes nothing."""
    straight = reader(rows)
    for _ in range(cut):
        if not straight.finished:
            straight.next_batch()
    state = pickle.loads(pickle.dumps(straight.snapshot()))
    assert pickle.dumps(straight.snapshot()) == pickle.dumps(straight.snapshot())
    resumed = reader(rows, state)
    assert items(resumed) == items(straight)
    assert (resumed.watermark, resumed.newest, resumed.counts) == (straight.watermark, straight.newest, straight.counts)


def items(source: Reader) -> list[Any]:
    """All items that a reader still gives."""
    taken: list[Any] = []
    while not source.finished:
        batch = source.next_batch()
        if batch is not None:
            taken += [item[:4] for item in batch.items]
    return taken
