"""The contract of whatever holds state: from its rows it goes on to the last bit, giving them changes nothing.

Every holder lives through the same lives: it is asked for its changes at random places (never, early, twice), ended
after a checkpoint, killed between two, and led apart; over rows in memory and over real state files.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from river import anomaly, base, facto, linear_model, metrics, naive_bayes, preprocessing, stats, utils

from dataflows import DISCARD, Event, Job, Label, Report, Time
from dataflows.admit import ANSWER, QUESTION, Admit, Work
from dataflows.connectors import Jsonl, Memory
from dataflows.evaluate import Publisher
from dataflows.learner import Learner
from dataflows.order import EVENT, LABEL, Batch, Reader, ReadMode
from dataflows.orderlog import OrderLog
from dataflows.pickles import names_of
from dataflows.remembered import EarlyLabels, Remembered
from dataflows.replay import answer_rows, empties_of, empty_columns, entity_features
from features import Count, Entity, Fields, Last, Max, Mean, NUnique, Quantile, River, Session, Sum, Tiled, Tumbling
from features.parts import FeatureParts
from features.rows import APPEND, Change, MemoryRows
from features.state import EntityFeatures
from features.windows import Lifetime

from .shelves import FileShelf, MemoryShelf, Shelf


class Sale(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    card: str
    amount: float | None = None
    wait: str = "5us"
    y: bool | None = None


class Verdict(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: bool | None


class Ruling(Event, time="t", unit="us"):
    """A label that knows its question by card and time only."""

    t: int
    card: str
    of: int
    y: bool


class Moody(base.Classifier):
    """Fails now and then, asked or taught, and changes by being asked, which river allows no model but some do."""

    def __init__(self) -> None:
        self.asked = self.learned = 0

    def predict_proba_one(self, x: dict[Any, Any], **kwargs: Any) -> dict[Any, float]:
        self.asked += 1
        if self.asked % 7 == 0:
            raise ValueError(f"asked {self.asked} times")
        return {True: self.learned / self.asked, False: 1 - self.learned / self.asked}

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        self.learned += 1
        if self.learned % 5 == 0:
            raise ValueError(f"learned {self.learned} times")


class Picky(stats.base.Univariate):
    """A user's statistic, which refuses a value after it has counted it."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, x: Any) -> None:
        self.n += 1
        if self.n % 4 == 0:
            raise ValueError("the fourth is refused")

    def get(self) -> int:
        return self.n


FEATURES = [
    Fields("amount"),
    Entity("card", [Count(), Mean("amount")], over=[20, Last(3), "lifetime"]),
    Entity(
        "card",
        [NUnique("amount", limit=3), Quantile("amount"), Max("amount")],
        over=[Tumbling(10), Tiled(20, resolution=5), Session(gap=4), 15],
        name="many",
    ),
    Entity("card", [Sum("amount")], over=Lifetime(), ttl=9, name="mortal"),
    Entity("card", [Sum("amount"), Max("amount")], over=[8, Tumbling(6)], name="short"),
    Entity("card", [River(stats.EWVar(), "amount"), River(Picky(), "amount")], name="river"),
    Entity("card", [Count(), Mean("y")], over=15, of="labels", name="label"),
]


def scaled() -> Any:
    """The usual model."""
    return preprocessing.StandardScaler() | linear_model.LogisticRegression()


def stream(event: type[Event] = Verdict, **more: Any) -> Label:
    """A label that is a stream of its own."""
    return Label(Memory(event=event, items=[]), field="y", **more)


def declare(label: Label, **more: Any) -> Job:
    """A job with many features."""
    declared: dict[str, Any] = {"features": FEATURES, "model": scaled(), "time": Time(lateness=3)} | more
    return Job(name="contract", events=Memory(event=Sale, items=[]), label=label, **declared)


JOB = declare(
    stream(horizon=30, otherwise=False, early=20, max_open=7),
    metrics=[metrics.ROCAUC(), utils.Rolling(metrics.LogLoss, window_size=5), metrics.Accuracy()],
    report=Report(outcomes=4),
    max_ids=20,
)
LATE = declare(stream(early=20, horizon=9), time=Time(order="arrival", lateness=5))
FEW = {"features": [Fields("amount"), FEATURES[-1]]}
ADMITS = {
    "first of a stream": JOB,
    "last of a stream": declare(stream(horizon=12, revisions="last", early=15, max_early=3, max_open=6), **FEW),
    "stream that waits for ever": declare(stream(early=0, max_early=0), max_ids=2, **FEW),
    "stream matched by card and time": declare(
        stream(Ruling, on="card", at="of", horizon=25, otherwise=True, early=30, max_early=2, max_open=3), **FEW
    ),
    "stream in arrival order": LATE,
    "field after a while": declare(Label(field="y", delay=7, horizon=9, otherwise=False, max_open=5), **FEW),
    "field after its own while": declare(Label(field="y", delay="wait"), max_ids=3, **FEW),
    "field at once": declare(Label(field="y", delay=0, horizon=4, otherwise=DISCARD), **FEW),
    "later event": declare(Label(field="y", after=4, by="card", horizon=11, otherwise=True, max_open=4), **FEW),
    "later event for ever": declare(Label(field="y", after=3, by="card"), time=Time(order="arrival", lateness=4)),
    "models per card": declare(stream(horizon=10), per="card", max_models=2, **FEW),
}
LEARNERS = {
    "global": JOB,
    "per card": declare(stream(horizon=8), per="card"),
    "bayes": declare(Label(field="y", delay=3), model=naive_bayes.GaussianNB(), **FEW),
    "unsupervised": declare(
        stream(early=5), model=anomaly.HalfSpaceTrees(n_trees=2, height=2, window_size=3, seed=1), **FEW
    ),
    "unsupervised per card": declare(
        stream(early=5), model=anomaly.HalfSpaceTrees(n_trees=2, height=2, window_size=3, seed=1), per="card", **FEW
    ),
    "drawing weights when asked": declare(Label(field="y", delay=9), model=facto.FMClassifier(seed=1)),
    "moody": declare(Label(field="y", delay=6), model=Moody(), **FEW),
}
OLD = Entity("card", [Count(), Mean("amount"), Sum("gone")], over=[20, "lifetime"])
NEW = Entity("card", [Max("amount"), Count(), Mean("amount")], over=["lifetime", 20])


# -- streams

Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@st.composite
def streams(draw: st.DrawFn) -> Rows:
    """Events and labels with duplicates, ties, late and early ones, orphans, revisions, missing values.

    Made from a seed: examples are long and full from the first on, where lists drawn one by one would be short.
    """
    rng = Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 80))
    ids = range(max(count // rng.choice([1, 1, 2]), 1))
    events = [
        {
            "id": rng.choice(ids),
            "t": t + rng.choice([0, 0, 1, 2, 5]),
            "card": rng.choice("aaabc"),
            "amount": rng.choice([None, 0.0, 1.5, rng.uniform(0, 9)]),
            "wait": rng.choice(["0us", "3us", "20us", "a while"]),
            "y": rng.choice([True, False, None]),
        }
        for t in range(count)
    ]
    labels = []
    for _ in range(draw(st.integers(0, count))):
        event = rng.choice(events)
        told = event["t"] + rng.choice([-20, -8, -1, 0, 1, 3, 8, 20])  # type: ignore[operator]
        named = {"id": event["id"] if rng.random() < 0.9 else 1000, "card": event["card"], "of": event["t"]}
        labels.append(named | {"t": max(told, 0), "y": rng.choice([True, False, False, None])})
    return events, sorted(labels, key=itemgetter("t"))


def batches(job: Job, rows: Rows) -> list[Batch]:
    """What the reader makes of a stream, in small batches, so that there are many places to stop at."""
    events, labels = rows
    inputs: list[Any] = [(EVENT, Memory(event=Sale, items=events, name="events"))]
    if job.label.source is not None:
        kept = [{name: row[name] for name in job.label_class.model_fields} for row in labels]
        kept = [row for row in kept if row["y"] is not None or job.label_class is Verdict]
        inputs.append((LABEL, Memory(event=job.label_class, items=kept, name="labels")))
    source, taken = Reader(inputs, job.time, batch_size=4), []
    while not source.finished:
        batch = source.next_batch()
        if batch is not None:
            taken.append(batch)
    return taken


def works(job: Job, rows: Rows) -> list[Work]:
    """What admit makes of it."""
    admit = Admit(job)
    return [admit.admit(batch) for batch in batches(job, rows)]


class Asked(NamedTuple):
    """A batch with the features of its questions."""

    work: Work
    columns: Any


def asked(job: Job, rows: Rows) -> list[Asked]:
    """What a learner gets of it."""
    features = [entity_features(job, entity) for entity in job.entities]
    steps = []
    for work in works(job, rows):
        columns = empty_columns(empties_of(job), work.questions)
        for (index, _), wanted in work.features.items():
            for place, answer in zip(*answer_rows(features[index], wanted), strict=True):
                columns[index][place] = answer
        steps.append(Asked(work, columns))
    return steps


def spoken(job: Job, rows: Rows) -> list[tuple[Work, list[Any]]]:
    """What learners said of each batch."""
    learner = Learner(job)
    return [(step.work, learned(learner, step)) for step in asked(job, rows)]


# -- holders


def described(work: Work) -> Any:
    """All that a Work says."""
    return work.number, work.questions, work.features, work.learners, work.reads, work.rejects, work.clock, work.end


def learned(learner: Learner, step: Asked) -> list[Any]:
    """What a learner says of a batch."""
    return [learner.process(operations, step.columns) for operations in step.work.learners.values()]


@dataclass
class Holder:
    """How one holder of state is fed step by step, rebuilt from its rows, and what may be read of it."""

    job: Job
    steps: Callable[[Job, Rows], Sequence[Any]]
    build: Callable[[Job, Shelf | None], Any]
    feed: Callable[[Any, Any], Any]
    look: Callable[[Any], Any]
    changes: Callable[[Any, bool], dict[str, Iterable[Change]]] = lambda thing, complete: {"it": thing.changes()}
    kept: Callable[[Any], Any] = lambda thing: None
    heads: tuple[str, ...] = ()
    """Keys of small rows that are given every time."""


def of(shelf: Shelf | None, part: str = "it") -> Any:
    """The rows of a part, None without a shelf."""
    return None if shelf is None else shelf.rows(part)


def admit_holder(job: Job) -> Holder:
    """Ids, open questions, early labels."""
    return Holder(
        job,
        batches,
        lambda job, shelf: Admit(job, 1, of(shelf)),
        lambda admit, batch: described(admit.admit(batch)),
        lambda admit: (len(admit), sorted(admit.counts.items()), admit.clock, admit.questions),
        heads=("admit",),
    )


def learner_holder(job: Job) -> Holder:
    """Models and questions; before a checkpoint it gives the questions only."""
    return Holder(
        job,
        asked,
        lambda job, shelf: Learner(job, of(shelf)),
        learned,
        lambda learner: (len(learner), list(learner.open_questions())),
        lambda learner, complete: {"it": learner.changes(models=complete)},
    )


def looked(features: Any) -> Any:
    """Features of entities known and unknown, once all has happened and later."""
    return [features.read(card, t) for card in "abz" for t in (120, 150)]


def feature_holder(job: Job, index: int, cache: int = 1_000_000) -> Holder:
    """Windows of all kinds; with a small cache, entities go from memory and come back."""

    def feed(features: EntityFeatures, work: Work) -> Any:
        answers = answer_rows(features, work.features.get((index, 0), []))
        if work.number % 3 == 0 and work.clock is not None:
            features.sweep(work.clock)
        return answers

    return Holder(
        job,
        works,
        lambda job, shelf: entity_features(job, job.entities[index], of(shelf), cache),
        feed,
        looked,
        kept=lambda features: features.trim(),
    )


def parts_holder(lateness: int, cache: int = 1_000_000) -> Holder:
    """A declaration that was added to: two states that answer as one."""

    def build(job: Job, shelf: Shelf | None) -> FeatureParts:
        parts = [
            EntityFeatures(each, lateness, rows=of(shelf, f"part {i}"), cache=cache)
            for i, each in enumerate((OLD, NEW))
        ]
        names = [name for name in OLD.feature_names if "gone" not in name]
        return FeatureParts(NEW, [(parts[0], names), (parts[1], [n for n in NEW.feature_names if n not in names])])

    def feed(features: FeatureParts, batch: Batch) -> Any:
        said: list[Any] = []
        for time, kind, id, _, _, event, _ in batch.items:
            if kind == LABEL:
                continue
            verb = (features.read, features.observe, features.ask, features.ask)[hash(id) % 4]
            values = () if verb == features.read else ((event.amount,),)  # type: ignore[attr-defined]
            said.append(verb(event.card, time, *values))  # type: ignore[attr-defined]
        return said

    def kept(features: FeatureParts) -> None:
        for part in features.parts:
            part.trim()

    return Holder(
        LATE if lateness else declare(Label(field="y", delay=0), **FEW),
        batches,
        build,
        feed,
        looked,
        lambda features, complete: {f"part {i}": part.changes() for i, part in enumerate(features.parts)},
        kept,
    )


def publisher_holder(job: Job) -> Holder:
    """Metrics and counts."""
    return Holder(
        job,
        spoken,
        lambda job, shelf: Publisher(job, of(shelf)),
        lambda publisher, step: publisher.publish(step[0].rejects, step[1], step[0].end),
        lambda publisher: (publisher.evaluator.values(), publisher.evaluator.now(), sorted(publisher.counts.items())),
        heads=("publisher",),
    )


def remembered_holder(limit: int) -> Holder:
    """Keys under a bound."""

    def feed(remembered: Remembered, batch: Batch) -> Any:
        return [
            (remembered.get(item[2], "unknown"), remembered.add(item[2], item[5].amount))  # type: ignore[attr-defined]
            for item in batch.items
        ]

    return Holder(
        LATE,
        lambda job, rows: [b for b in batches(job, rows) if all(item[1] == EVENT for item in b.items)],
        lambda job, shelf: Remembered("ids", limit, of(shelf)),
        feed,
        lambda remembered: [(key, remembered.get(key, "unknown")) for key in remembered.numbers],
    )


def early_holder() -> Holder:
    """Labels that wait, taken by their question or for their age."""

    def feed(early: EarlyLabels, batch: Batch) -> Any:
        said: list[Any] = []
        for time, kind, id, _, offset, event, raw in batch.items:
            match = (id or 0) % 9
            if kind == LABEL:
                early.keep(match, event.y, time, f"labels:{offset}", raw)  # type: ignore[attr-defined]
            elif match in early.entries:
                said.append(early.pop(match)[:5])
            while len(early.entries) > 5 or early.first_came() < time - 15:
                key, entry = early.pop_first()
                said.append((key, entry[:5]))
        return said

    return Holder(
        LATE,
        batches,
        lambda job, shelf: EarlyLabels(of(shelf)),
        feed,
        lambda early: sorted((key, entry[:5]) for key, entry in early.entries.items()),
    )


HOLDERS: dict[str, Holder] = (
    {f"Admit, {name}": admit_holder(job) for name, job in ADMITS.items()}
    | {f"Learner, {name}": learner_holder(job) for name, job in LEARNERS.items()}
    | {f"EntityFeatures {each.label}": feature_holder(JOB, i) for i, each in enumerate(JOB.entities)}
    | {f"EntityFeatures {each.label}, late": feature_holder(LATE, i, 2) for i, each in enumerate(LATE.entities)}
    | {"FeatureParts": parts_holder(0), "FeatureParts, late": parts_holder(5, 1)}
    | {"Publisher": publisher_holder(JOB)}
    | {f"Remembered {limit}": remembered_holder(limit) for limit in (0, 1, 5, 100)}
    | {"EarlyLabels": early_holder()}
)

EACH = pytest.mark.parametrize("name", HOLDERS)


# -- lives


class Life:
    """A holder on its way through the steps of a stream, with the shelf it keeps its rows on."""

    def __init__(self, holder: Holder, steps: Sequence[bytes], shelf: Shelf | None, said: Sequence[str] = ()) -> None:
        self.holder = holder
        self.shelf = shelf
        self.said = list(said)
        self._steps = steps
        self._committed = len(self.said)
        self.thing = holder.build(holder.job, shelf)

    def feed(self) -> None:
        """The next step; its own copy, so that no two lives can lean on objects that one of them changed."""
        self.said.append(repr(self.holder.feed(self.thing, pickle.loads(self._steps[len(self.said)]))))

    def keep(self, complete: bool) -> set[str]:
        """Write what changed; which keys."""
        assert self.shelf is not None
        keys: set[str] = set()
        for part, changes in self.holder.changes(self.thing, complete).items():
            self.shelf.write(len(self.said), part, noted(changes, keys), complete)
        self.holder.kept(self.thing)
        if complete:
            self.shelf.commit(len(self.said))
            self._committed = len(self.said)
        return keys

    def restart(self) -> None:
        """End after a checkpoint and begin again from the rows."""
        assert self.shelf is not None
        self.keep(True)
        self.shelf = self.shelf.again()
        self.thing = self.holder.build(self.holder.job, self.shelf)

    def crash(self) -> None:
        """End without a checkpoint: begin again at the last one, and go the same way once more."""
        assert self.shelf is not None
        reached = len(self.said)
        self.shelf = self.shelf.again()
        self.thing = self.holder.build(self.holder.job, self.shelf)
        del self.said[self._committed :]
        while len(self.said) < reached:
            self.feed()

    def part(self) -> Life:
        """Another that goes on from here, beside this one."""
        assert self.shelf is not None
        self.keep(True)
        return Life(self.holder, self._steps, self.shelf.apart(), self.said)


def noted(changes: Iterable[Change], keys: set[str]) -> Iterator[Change]:
    """The changes, their keys noted."""
    for change in changes:
        keys.add(change[0])
        yield change


ACTIONS = st.lists(
    st.sampled_from(["", "", "flush", "flush twice", "checkpoint", "restart", "crash", "part"]), min_size=1, max_size=9
)


def live(holder: Holder, steps: Sequence[bytes], plan: Sequence[str], shelf: Shelf) -> list[Life]:
    """One or several lives from one beginning; after each step the newest does what is planned."""
    lives = [Life(holder, steps, shelf)]
    for number in range(len(steps)):
        for each in lives:
            each.feed()
        action, newest = plan[number % len(plan)], lives[-1]
        if action == "restart":
            newest.restart()
        elif action == "crash":
            newest.crash()
        elif action == "part" and len(lives) < 3:
            lives.append(newest.part())
        elif action:
            newest.keep(action == "checkpoint")
            if action == "flush twice":
                assert newest.keep(False) <= set(holder.heads)
    return lives


def straight_life(holder: Holder, steps: Sequence[bytes]) -> Life:
    """A life without rows, in which nothing happens."""
    life = Life(holder, steps, None)
    for _ in steps:
        life.feed()
    return life


def steps_of(holder: Holder, rows: Rows) -> list[bytes]:
    """The steps of a stream, each to be copied for whom it is fed to."""
    return [pickle.dumps(step) for step in holder.steps(holder.job, rows)]


def compare(holder: Holder, rows: Rows, plan: Sequence[str], shelf: Shelf) -> None:
    """However a life went, it says what one says in which nothing happened."""
    steps = steps_of(holder, rows)
    straight = straight_life(holder, steps)
    lives = live(holder, steps, plan, shelf)
    try:
        for each in lives:
            assert each.said == straight.said
            assert repr(holder.look(each.thing)) == repr(holder.look(straight.thing))
    finally:
        for each in lives:
            assert each.shelf is not None
            each.shelf.close()


@EACH
@settings(max_examples=15)
@given(rows=streams(), plan=ACTIONS)
def test_it_goes_on_identically_from_rows_in_memory(name: str, rows: Rows, plan: list[str]) -> None:
    """Ended, killed, rebuilt again and again or led apart, it says to the last bit what it says undisturbed."""
    compare(HOLDERS[name], rows, plan, MemoryShelf())


@EACH
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=streams(), plan=ACTIONS)
def test_it_goes_on_identically_from_a_state_file(name: str, rows: Rows, plan: list[str], tmp_path: Path) -> None:
    """The same over real files: versions, roll-backs to the last checkpoint, branches, and nothing foreign in it."""
    holder = HOLDERS[name]
    with TemporaryDirectory(dir=tmp_path) as directory:
        compare(holder, rows, plan, FileShelf(Path(directory) / "first", names_of(holder.job)))


@EACH
@settings(max_examples=8)
@given(rows=streams())
def test_looking_at_it_and_asking_for_changes_change_nothing(name: str, rows: Rows) -> None:
    """With a look and its changes after every step it says what it says without; asked again, it has none to give."""
    holder = HOLDERS[name]
    steps = steps_of(holder, rows)
    watched = Life(holder, steps, MemoryShelf())
    for _ in steps:
        watched.feed()
        assert repr(holder.look(watched.thing)) == repr(holder.look(watched.thing))
        watched.keep(True)
        assert watched.keep(True) <= set(holder.heads)
    assert watched.said == straight_life(holder, steps).said


@EACH
@settings(max_examples=3)
@given(rows=streams())
def test_two_of_them_share_nothing(name: str, rows: Rows) -> None:
    """One that was fed leaves a new one as empty as ever."""
    holder = HOLDERS[name]
    empty = repr(holder.look(holder.build(holder.job, None)))
    straight_life(holder, steps_of(holder, rows))
    assert repr(holder.look(holder.build(holder.job, None))) == empty


# -- the reader

Round = tuple[list[tuple[str, list[int]]], int, str]
"""Lines to append (partition, event times), batches to ask for then, and what becomes of the reader."""


@st.composite
def readings(draw: st.DrawFn) -> list[Round]:
    """Rounds in which time goes on; from a seed, as `streams`."""
    rng = Random(draw(st.integers(0, 2**32)))
    rounds: list[Round] = []
    for number in range(draw(st.integers(1, 30))):
        feeds = [
            (rng.choice(["a", "b", "labels"]), [3 * number + rng.randrange(9) for _ in range(rng.randint(1, 4))])
            for _ in range(rng.choice([0, 1, 1, 2, 3]))
        ]
        action = rng.choice(["", "", "checkpoint", "checkpoint", "flush", "restart", "restart", "crash"])
        rounds.append((feeds, rng.choice([0, 1, 1, 2, 3]), action))
    return rounds


TIMES = st.builds(
    Time,
    order=st.sampled_from(["event_time", "arrival"]),
    lateness=st.sampled_from([0, 4, 30]),
    buffer=st.sampled_from([3, 1000]),
    idle=st.just(3600.0),  # nothing here shall depend on a clock
)


class Place(Event, id="id", time="t", unit="us"):
    id: int
    t: int


class Inputs:
    """Files that grow; every fifth line is damaged."""

    def __init__(self, directory: Path, partitions: Sequence[str]) -> None:
        self.sources = [(LABEL if name == "labels" else EVENT, Jsonl(directory / name, Place)) for name in partitions]
        self._lines = 0
        self._directory = directory
        self._partitions = partitions
        for name in partitions:
            (directory / name).touch()

    def feed_all(self, feeds: Iterable[Iterable[tuple[str, list[int]]]]) -> None:
        """Append lines to those of them that there are."""
        for name, times in chain.from_iterable(feeds):
            if name in self._partitions:
                self.feed(name, times)

    def feed(self, name: str, times: Iterable[int]) -> None:
        """Append lines to one of them."""
        with (self._directory / name).open("a") as file:
            for t in times:
                self._lines += 1
                id = self._lines // 3  # the same for labels and events now and then
                file.write("damaged\n" if self._lines % 5 == 0 else f'{{"id": {id}, "t": {t}}}\n')


class ReaderLife:
    """A reader with its order log and its rows, asked for batches, ended and killed."""

    def __init__(self, inputs: Inputs, options: dict[str, Any], log: Path, shelf: Shelf) -> None:
        self.shelf = shelf
        self.said: list[Any] = []
        self._inputs, self._options, self._log = inputs, options, log
        self._kept = 0
        self.reader = self._open()

    def _open(self) -> Reader:
        return Reader(self._inputs.sources, **self._options, log=OrderLog(self._log), rows=self.shelf.rows("it"))

    def next(self) -> Any:
        """All that downstream sees of the next batch; None when there is none now."""
        said = shape(self.reader.next_batch())
        if said is not None:
            self.said.append(said)
        return said

    def keep(self, complete: bool) -> None:
        """Write what changed."""
        self.shelf.write(self.reader.number, "it", self.reader.changes(), complete)
        if complete:
            self.shelf.commit(self.reader.number)
            self._kept = len(self.said)

    def restart(self) -> None:
        """End after a checkpoint and begin again."""
        self.keep(True)
        before = self._reached()
        self._begin_again()
        assert self._reached() == before
        assert not self.reader.replaying

    def crash(self) -> None:
        """End between checkpoints: every batch that left since the last is formed again, and nothing more."""
        lost = self.said[self._kept :]
        self._begin_again()
        again = []
        while self.reader.replaying:
            again.append(shape(self.reader.next_batch()))
        assert again == lost

    def _reached(self) -> Any:
        offsets = {name: (position.byte, position.line) for name, position in self.reader.offsets().items()}
        return offsets, self.reader.watermark, self.reader.newest, self.reader.counts

    def _begin_again(self) -> None:
        self.reader.close()
        self.shelf = self.shelf.again()
        self.reader = self._open()

    def close(self) -> None:
        """Give up files."""
        self.reader.close()
        self.shelf.close()


def shape(batch: Batch | None) -> Any:
    """All that downstream sees of a batch."""
    if batch is None:
        return None
    return batch.number, [item[:5] for item in batch.items], batch.rejects, batch.watermark, batch.end


@pytest.mark.parametrize("shelf", ["memory", "file"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    partitions=st.sampled_from([["a"], ["a", "labels"], ["a", "b", "labels"]]),
    plan=readings(),
    time=TIMES,
    size=st.integers(1, 7),
    linger=st.sampled_from([0.0, 3600.0, 3600.0]),
    follow=st.sampled_from([True, True, False]),
)
def test_a_reader_goes_on_identically(
    shelf: str, partitions: list[str], plan: list[Round], time: Time, size: int, linger: float, follow: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Ended anywhere it gives batch by batch what reading on gives; killed, what had left leaves again, bit for bit."""
    with TemporaryDirectory(dir=tmp_path) as name, ExitStack() as stack:
        directory = Path(name)
        inputs = Inputs(directory, partitions)
        kept = MemoryShelf() if shelf == "memory" else FileShelf(directory / "state", frozenset())
        options: dict[str, Any] = {"time": time, "batch_size": size, "linger": linger, "mode": ReadMode(follow=follow)}
        life = ReaderLife(inputs, options, directory / "log", kept)
        stack.callback(life.close)
        straight = Reader(inputs.sources, **options)
        stack.callback(straight.close)
        if not follow:  # an ended file that grows is another story
            inputs.feed_all(feeds for feeds, _, _ in plan)
        alike = True
        undisturbed: list[Any] = []
        for feeds, asked_for, action in plan:
            if follow:
                inputs.feed_all([feeds])
            for _ in range(asked_for):
                said, expected = life.next(), shape(straight.next_batch())
                undisturbed.append(expected)
                # How soon the end of an input is noticed is no one's concern, so there it is all of it that counts.
                assert not alike or not follow or said == expected
            if action == "crash":
                life.crash()
                alike = False  # what had been pulled for a batch that did not leave may now be pulled in another order
            elif action == "restart":
                life.restart()
            elif action:
                life.keep(action == "checkpoint")
        if alike and not follow:
            while not life.reader.finished:
                life.next()
            while not straight.finished:
                undisturbed.append(shape(straight.next_batch()))
            assert together(life.said) == together(undisturbed)
        life.crash()


def together(shapes: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """All items and all rejects, however they were cut into batches."""
    listed = [each for each in shapes if each is not None]
    return [item for each in listed for item in each[1]], [refused for each in listed for refused in each[2]]


# -- what is written follows what happened, not what is held

MANY = 100_000
FEW_BYTES = 6_000
"""For ten events after a hundred thousand. One full chunk, or one entity's window, would be more."""


def written(changes: Iterable[Change]) -> int:
    """Bytes of keys and values."""
    return sum(len(key) + len(value) for key, _, value in changes)


def sales(begin: int, end: int, t: int | None = None) -> Batch:
    """Sales a microsecond apart (or all at one time), straight from the reader."""
    items: list[Any] = []
    for id in range(begin, end):
        event = Sale.model_construct(id=id, t=id, card="a", amount=0.5, wait="0us", y=True)
        items.append((id if t is None else t, EVENT, id, "sales", id, event, b""))
    return Batch(1, items, [], None, False)


def verdicts(ids: Iterable[int], t: int) -> Batch:
    """Labels of questions, or of questions to come."""
    items: list[Any] = [(t, LABEL, id, "verdicts", id, Verdict.model_construct(id=id, t=t, y=True), b"x") for id in ids]
    return Batch(1, items, [], None, False)


@pytest.mark.parametrize("over", [MANY * 2, Last(MANY * 2)])
def test_a_long_window_is_written_once(over: Any) -> None:
    """Ten events more in a window of a hundred thousand are ten events to write, every time."""
    rows = MemoryRows()
    features = EntityFeatures(Entity("card", [Count(), Mean("x"), Max("x")], over=over), rows=rows)
    for t in range(MANY):
        features.observe("a", t, (0.5,))
    rows.apply(features.changes())
    sizes = []
    for t in range(MANY, MANY + 1000, 10):
        for later in range(t, t + 10):
            features.observe("a", later, (0.5,))
        changes = list(features.changes())
        assert [kind for _, kind, _ in changes] == [APPEND]
        sizes.append(written(changes))
        rows.apply(changes)
    assert max(sizes) < 300
    again = EntityFeatures(Entity("card", [Count(), Mean("x"), Max("x")], over=over), rows=rows)
    assert again.read("a", MANY + 1000) == features.read("a", MANY + 1000)


@pytest.mark.parametrize(
    "over", [500, Last(500), "lifetime", Session(10), Tumbling(500), Tiled(500, resolution=50)], ids=str
)
@pytest.mark.parametrize("lateness", [0, 50])
def test_an_entity_is_written_whole_once_in_a_while_only(over: Any, lateness: int) -> None:
    """Over thousands of checkpoints the bytes follow the events; reading back goes through few parts and events."""
    rows = MemoryRows()
    features = EntityFeatures(Entity("card", [Count(), Mean("x"), Max("x")], over=over), lateness, rows=rows)
    total = 0
    for t in range(6000):
        features.observe("a", t, (0.5,))
        if t % 3 == 2:
            changes = list(features.changes())
            total += written(changes)
            rows.apply(changes)
    assert total < 6000 * 100
    parts = rows.get('"a')
    assert len(parts) <= 8 + 700 // 8 + 1
    assert sum(len(events) for events in (parts[0][1], *parts[1:])) <= 32 + 700 + 3


def test_open_questions_of_admit_are_written_once() -> None:
    """Of a hundred thousand that wait, ten more and ten answered at random places write a chunk and some masks."""
    admit = Admit(declare(stream(max_open=2 * MANY), time=Time(), **FEW), rows=MemoryRows())
    admit.admit(sales(0, MANY))
    assert written(admit.changes()) > MANY * 20
    admit.admit(sales(MANY, MANY + 10))
    assert written(admit.changes()) < FEW_BYTES
    admit.admit(verdicts(range(500, MANY, MANY // 10), MANY + 20))
    assert written(admit.changes()) < FEW_BYTES
    assert len(admit) == MANY


def test_revised_labels_are_written_alone() -> None:
    """Ten of a hundred thousand open questions that got another label are ten small rows, not their chunks."""
    label = stream(max_open=2 * MANY, revisions="last", horizon=10 * MANY)
    admit = Admit(declare(label, time=Time(), **FEW), rows=MemoryRows())
    admit.admit(sales(0, MANY))
    list(admit.changes())
    for _ in range(3):
        admit.admit(verdicts(range(500, MANY, MANY // 10), MANY + 20))
        assert written(admit.changes()) < FEW_BYTES


def test_ids_are_written_once() -> None:
    """A hundred thousand remembered ids, at their bound: ten new ones push ten old ones out for a few bytes."""
    admit = Admit(declare(Label(field="y", delay=0), time=Time(), max_ids=MANY, **FEW), rows=MemoryRows())
    admit.admit(sales(0, MANY))
    assert written(admit.changes()) > MANY * 3
    admit.admit(sales(MANY, MANY + 10))
    assert written(admit.changes()) < FEW_BYTES


def test_early_labels_are_written_once() -> None:
    """A hundred thousand labels wait for their questions; ten more, and ten that are taken, are few bytes."""
    label = stream(early=10 * MANY, max_early=MANY + 100)
    admit = Admit(declare(label, time=Time(), **FEW), rows=MemoryRows())
    admit.admit(verdicts(range(MANY), 0))
    assert written(admit.changes()) > MANY * 20
    admit.admit(verdicts(range(MANY, MANY + 10), 1))
    assert written(admit.changes()) < FEW_BYTES
    admit.admit(sales(500, 510, t=2))
    assert written(admit.changes()) < FEW_BYTES


def test_open_questions_of_a_learner_are_written_once() -> None:
    """Of a hundred thousand, ten more and ten learned are few bytes and the model."""
    job = declare(stream(), features=[Fields("amount")], time=Time())
    learner = Learner(job, MemoryRows())
    ask: list[Any] = [(QUESTION, n, n, n, n, n, False, None, (0.5,), None) for n in range(1, MANY + 11)]
    learner.process(ask[:MANY], [])
    assert written(learner.changes()) > MANY * 20
    learner.process(ask[MANY:], [])
    model = len(pickle.dumps(learner.models()[None], 5))
    assert written(learner.changes()) < FEW_BYTES + model
    learner.process([(ANSWER, n, n, True, MANY, False) for n in range(500, MANY, MANY // 10)], [])
    assert written(learner.changes()) < FEW_BYTES + model
    learner.process([(ANSWER, 0, 7, True, MANY, False)], [])
    assert written(learner.changes(models=False)) < 1_000


def test_models_that_had_nothing_to_do_are_not_written() -> None:
    """Of a thousand models per key only those asked or taught since are rows of the next checkpoint."""
    learner = Learner(declare(stream(), features=[Fields("amount")], per="card", time=Time()), MemoryRows())
    learner.process([(QUESTION, n, n, n, n, n, False, f"c{n}", (0.5,), None) for n in range(1, 1001)], [])
    assert sum(key.startswith("model/") for key, *_ in learner.changes()) == 1000
    asked: list[Any] = [
        (QUESTION, 1, 1001, 1, 1001, 1001, False, "c5", (0.5,), None),
        (ANSWER, 2, 7, True, 2000, False),
    ]
    learner.process(asked, [])
    assert {key for key, *_ in learner.changes() if key.startswith("model/")} == {'model/"c5', 'model/"c7'}


def test_what_waits_in_the_reader_is_written_once(tmp_path: Path) -> None:
    """Twenty thousand items in the buffer; ten more are few bytes."""
    file = tmp_path / "a"
    lines = [f'{{"id": {n}, "t": {n}}}\n' for n in range(20_010)]
    file.write_text("".join(lines[:-10]))
    source = Jsonl(file, Place)
    reader = Reader([(EVENT, source)], Time(lateness=MANY), linger=3600, mode=ReadMode(follow=True), rows=MemoryRows())
    assert reader.next_batch() is None
    assert written(reader.changes()) > 20_000 * 10
    with file.open("a") as more:
        more.writelines(lines[-10:])
    assert reader.next_batch() is None
    assert written(reader.changes()) < FEW_BYTES
    reader.close()
