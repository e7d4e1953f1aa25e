"""What a learner noted, learned again: of any model, in any order, with restarts, one model or one for each key."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from river import anomaly, compose, facto, forest, linear_model, neighbors, preprocessing, tree

from dataflows import Event, Job, Label, Time
from dataflows.connectors.memory import Memory
from dataflows.events import Prediction
from dataflows.job import Audit
from dataflows.learner import Learner
from dataflows.learnlog import PROTOTYPE
from dataflows.learnstore import LearnReader, LearnWriter
from dataflows.order import Reader
from dataflows.pickles import names_of
from dataflows.relearn import (
    END,
    UNKNOWN,
    Broken,
    Passed,
    Reached,
    Relearning,
    Said,
    Segment,
    Target,
    Taught,
    beginnings,
    segments,
)
from dataflows.replay import PlainRun, inputs_of
from dataflows.state import Lineage, StateError, Version
from features import Count, Entity, Fields, Mean
from features.rows import MemoryRows


class Thing(Event, id="id", time="at", unit="s"):
    id: int
    at: int
    key: str
    a: float
    b: float | None
    y: bool
    kind: str
    value: float


class Failing(linear_model.LogisticRegression):
    def predict_proba_one(self, x: Any, **named: Any) -> Any:
        if x["a"] > 0.9:
            self.intercept += 0.125
            raise ValueError("too much")
        return super().predict_proba_one(x)  # type: ignore[no-untyped-call]

    def learn_one(self, x: Any, y: Any, w: float = 1.0) -> None:
        if x["a"] < 0.1:
            self.intercept -= 0.125
            raise ValueError("too little")
        super().learn_one(x, y)


class Shy(anomaly.HalfSpaceTrees):
    def learn_one(self, x: Any) -> None:
        if x["a"] < 0.2:
            raise ValueError("too little")
        super().learn_one(x)  # type: ignore[no-untyped-call]


MODELS: dict[str, tuple[Any, str]] = {
    "logistic": (preprocessing.StandardScaler() | linear_model.LogisticRegression(), "y"),
    "linear": (preprocessing.StandardScaler() | linear_model.LinearRegression(), "value"),
    "tree": (tree.HoeffdingTreeClassifier(grace_period=20), "y"),
    "regression tree": (tree.HoeffdingAdaptiveTreeRegressor(grace_period=20, seed=3), "value"),
    "forest": (forest.ARFClassifier(n_models=2, seed=1), "y"),
    "half space": (anomaly.HalfSpaceTrees(n_trees=3, height=3, window_size=20, seed=4), "y"),
    "shy": (Shy(n_trees=3, height=3, window_size=20, seed=4), "y"),
    "factors": (compose.Select("a", "count_by_key") | facto.FMClassifier(n_factors=2, seed=3), "y"),
    "factors of values": (preprocessing.StandardScaler() | facto.FMRegressor(n_factors=2, seed=3), "value"),
    "kinds": (preprocessing.StandardScaler() | linear_model.SoftmaxRegression(), "kind"),
    "neighbors": (neighbors.KNNClassifier(n_neighbors=2), "kind"),
    "failing": (Failing(), "y"),
}


def things(count: int = 240) -> list[dict[str, Any]]:
    """Some events, of which b is missing here and there."""
    rows = []
    for i in range(count):
        a = (i * 7919 % 997) / 997
        rows.append(
            {
                "id": i, "at": i, "key": f"k{i * 31 % 5}", "a": a, "b": None if i % 9 == 4 else math.sin(i),
                "y": a > 0.6, "kind": "xyz"[i * 13 % 7 % 3], "value": a * 3 + 1,
            }
        )  # fmt: skip
    return rows


def declared(kind: str = "logistic", delay: str = "25s", **more: Any) -> Job:
    """The job of a kind of model."""
    model, field = MODELS[kind]
    fields = ("a",) if kind in ("neighbors", "failing", "linear", "logistic", "kinds") else ("a", "b")
    return Job(
        name="things", events=Memory(event=Thing, items=[], name="events"),
        features=[Fields(*fields), Entity("key", [Count(), Mean("a")])], model=model,
        label=Label(field=field, delay=delay), audit=Audit(every=more.pop("every", 30)), **more,
    )  # fmt: skip


class Logged(NamedTuple):
    """What a run left: the log's file, what was predicted, and the models at its end."""

    path: Path
    job: Job
    predictions: list[Prediction]
    models: dict[Any, tuple[Any, int]]

    def reader(self, batch: int = 1 << 30) -> LearnReader:
        """The log."""
        return LearnReader(self.path, Lineage([], Version(1, batch)), names_of(self.job))


def ran(path: Path, job: Job, events: list[dict[str, Any]] | None = None, restart: int = 7, write: int = 2) -> Logged:
    """A run that is begun again from its rows each so many batches, and writes its log each so many."""
    reader = Reader(inputs_of(job, events if events is not None else things()), job.time, batch_size=10)
    run, rows = PlainRun(job, reader), MemoryRows()
    assert job.audit is not None
    said: list[Prediction] = []
    writer, number = LearnWriter(path, Lineage([], Version(1, 0)), 1, job.audit, {}), 0

    def begin() -> Any:
        log = writer.log(job.feature_names)
        run.learner = Learner(job, rows, 1, log)
        return log

    log = begin()
    while not reader.finished:
        batch = reader.next_batch()
        if batch is None:
            continue
        said += [r for r in run.process(run.admit.admit(batch)) if isinstance(r, Prediction)]
        number = batch.number
        if number % write == 0 and log:
            writer.write(number, log.take())
        if number % restart == 0:
            if log:
                writer.write(number, log.take())
            rows.apply(run.learner.changes())
            writer.close()
            writer = LearnWriter(path, Lineage([], Version(1, number)), 1, job.audit, {})
            log = begin()
    if log:
        writer.write(number + 1, log.take())
    writer.close()
    rows.apply(run.learner.changes())
    models = {key: run.learner.model(key) for key in {None, *(f"k{i}" for i in range(5))}}
    return Logged(path, job, said, {key: (m[0], m[2]) for key, m in models.items() if m is not None})


def all_of(log: LearnReader) -> list[Segment]:
    """Everything that can be carried out again."""
    return [Segment(key, each.frame, END) for (_, key), each in beginnings(log).items() if each.frame is not None]


@pytest.mark.parametrize("per", [None, "key"])
@pytest.mark.parametrize("order", ["event_time", "arrival"])
@pytest.mark.parametrize("kind", MODELS)
def test_all_that_was_said_is_said_again(kind: str, order: Any, per: str | None, tmp_path: Path) -> None:
    """Every prediction, every keyframe and the models at the end are the same, to the last bit."""
    job = declared(kind, per=per, time=Time(order=order), every=30 if per is None else 7)
    run = ran(tmp_path / "log", job)
    log = run.reader()
    again = Relearning(log, all_of(log))
    steps = list(again.run())
    said = [step for step in steps if isinstance(step, Said)]
    assert not [step for step in steps if isinstance(step, Broken)]
    assert all(step.equal and step.logged is not UNKNOWN for step in said)
    assert [step.id for step in said] == [prediction.id for prediction in run.predictions]
    passed = [step for step in steps if isinstance(step, Passed)]
    assert len(passed) >= 5
    assert [step.difference for step in passed] == [None] * len(passed)
    learned = {key: examples for key, (_, examples, _) in again.models(1).items()}
    assert sorted(learned.values()) == sorted(examples for _, examples in run.models.values())
    assert again.relearned == sum(learned.values())
    log.close()


@pytest.mark.parametrize("kind", ["logistic", "factors", "forest", "shy"])
@pytest.mark.parametrize("per", [None, "key"])
def test_each_alone_is_the_same_from_the_nearest_keyframe(kind: str, per: str | None, tmp_path: Path) -> None:
    """Whichever place is asked for, it is reached from less than `every` examples before, and what is said is equal."""
    run = ran(tmp_path / "log", declared(kind, per=per, every=15))
    log = run.reader()
    for head in log.heads:
        for place, entry in list(enumerate(log.entries(head.version)[1]))[::7]:
            key = "null" if per is None else '"' + entry[2]
            target = Target((head.version, place + 1), key, 1)
            [segment] = segments(log, [target])
            assert segment.end == target.end
            said = [step for step in Relearning(log, [segment]).run() if isinstance(step, Said)]
            assert all(step.equal for step in said)
            assert all(step.relearned <= 15 for step in said)
    log.close()


def test_a_segment_to_the_next_keyframe_compares_it(tmp_path: Path) -> None:
    """Also where the keyframe is at the very end of a chunk, or at its beginning."""
    run = ran(tmp_path / "log", declared(every=10), restart=5, write=1)
    log = run.reader()
    frames = [frame for frame in log.frames() if frame.key != PROTOTYPE]
    sizes = {head.version: head.asked + head.learned for head in log.heads}
    assert any(frame.place == sizes[frame.version] for frame in frames)
    for frame in frames:
        end = (frame.version, frame.place)
        [segment] = segments(log, [Target(end, "null", 1)], to_keyframes=True)
        assert segment.end == end
        passed = [step for step in Relearning(log, [segment]).run() if isinstance(step, Passed)]
        assert [(step.frame, step.difference) for step in passed] == [(frame, None)]
    log.close()


def test_the_stop_is_reached_before_anything_later(tmp_path: Path) -> None:
    """Models can be looked at as they were after a version."""
    run = ran(tmp_path / "log", declared())
    log = run.reader()
    stop = log.heads[4].version
    again = Relearning(log, all_of(log), stop)
    before = 0
    for step in again.run():
        if isinstance(step, Reached):
            break
        assert isinstance(step, Passed) or step.place[0] <= stop
        before += isinstance(step, Taught)
    assert again.models(1)["null"][1] == before == sum(head.learned for head in log.heads[:5])
    log.close()


def test_a_job_older_than_its_log_begins_with_its_models_of_then(tmp_path: Path) -> None:
    """A model without examples, but asked before (it drew weights), is not taken for a new one."""
    job = declared("factors", delay="1d")
    rows = MemoryRows()
    run = PlainRun(job, Reader(inputs_of(job, things(40)), job.time, batch_size=40))
    run.learner = Learner(job, rows)
    list(run.run())
    rows.apply(run.learner.changes())
    found = rows.get("model/null")
    assert found
    model, name, _ = found[0]
    rows.apply([("model/null", 0, pickle.dumps((model, name, 0)))])
    assert job.audit is not None
    writer = LearnWriter(tmp_path / "log", Lineage([], Version(1, 0)), 1, job.audit, {})
    log = writer.log(job.feature_names)
    learner = Learner(job, rows, 1, log)
    learner.process([(0, 0, 900, 0, "x", 10**9, False, None, (0.5, None), None)], [[(3, 0.25)]])
    assert len(log) == 3, "prototype, keyframe, question"
    writer.write(1, log.take())
    reader = LearnReader(tmp_path / "log", Lineage([], Version(1, 1)), names_of(job))
    begin = beginnings(reader)[1, "null"]
    assert begin.frame is not None
    assert begin.frame.key == "null"
    reader.close()
    writer.close()


def test_what_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    """Without prototype and keyframe."""
    run = ran(tmp_path / "log", declared())
    log = run.reader()
    with pytest.raises(StateError, match="no model any more"):
        segments(log, [Target((log.heads[2].version, 1), "null", 7)])
    log.close()
