"""The learner, through `Job.play`: score before learning, features as asked, versions, models per key, faults."""

from __future__ import annotations

import pickle
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from river import anomaly, base, dummy, linear_model, naive_bayes, neighbors, preprocessing, stats, tree

from dataflows import Event, Job, JobError, Label, Outcome, Prediction, Reject
from dataflows.admit import ANSWER, QUESTION, Admit
from dataflows.connectors import Memory
from dataflows.learner import Learner
from dataflows.order import EVENT, Reader
from dataflows.pickles import names_of
from dataflows.replay import PlainRun, answer_rows, empties_of, empty_columns, entity_features, inputs_of
from features import Count, Derived, Entity, Fields, Mean
from tests.contracts.shelves import FileShelf


class Ask(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    key: str = "k"
    x: float | None = 0.0
    y: float | None = 0.0


class Sorted(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    x: float = 0.0
    y: bool = False


class Named(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    x: float = 0.0
    y: str = ""


class Recorder(base.Regressor):
    """Remembers every call, and the very numbers it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def predict_one(self, x: dict[Any, Any]) -> float:
        self.calls.append(("ask", dict(x)))
        return float(len(self.calls))

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        self.calls.append(("learn", dict(x), y))


class Moody(base.Regressor):
    """Fails when x is 1 (asked) or y is 1 (taught)."""

    def __init__(self) -> None:
        self.learned: list[float] = []

    def predict_one(self, x: dict[Any, Any]) -> float:
        return float(1 / (x["x"] - 1))

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        self.learned.append(1 / (y - 1))


def job(model: Any, event: type[Event] = Ask, **more: Any) -> Job:
    """A small job."""
    declared: dict[str, Any] = {"features": [Fields("x")], "label": Label(field="y", delay=0)} | more
    return Job(name="learn", events=Memory(event=event, items=[]), model=model, **declared)


def run(job: Job, rows: list[Any]) -> tuple[list[Any], PlainRun]:
    """The records of a run and the run itself."""
    plain = PlainRun(job, Reader(inputs_of(job, rows), job.time))
    return list(plain.run()), plain


def predictions(records: list[Any]) -> list[Prediction]:
    """The predictions among records."""
    return [r for r in records if isinstance(r, Prediction)]


def outcomes(records: list[Any]) -> list[Outcome]:
    """The outcomes among records."""
    return [r for r in records if isinstance(r, Outcome)]


def rejects(records: list[Any]) -> list[Reject]:
    """The rejects among records."""
    return [r for r in records if isinstance(r, Reject)]


def test_score_comes_before_learning_and_learning_takes_the_features_as_asked() -> None:
    """The model is asked, later taught with the very features of the question though they have changed since."""
    features = [Fields("x"), Entity("key", [Count()], over="1h")]
    rows = [{"id": i, "t": i, "x": 10 * i, "y": -i} for i in range(4)]
    _, plain = run(job(Recorder(), features=features, label=Label(field="y", delay=2)), rows)
    asked = [{"x": 10.0 * i, "count_1h_by_key": i + 1} for i in range(4)]
    assert plain.learner.models()[None][0].calls == [
        ("ask", asked[0]),
        ("ask", asked[1]),
        ("learn", asked[0], 0.0),
        ("ask", asked[2]),
        ("learn", asked[1], -1.0),
        ("ask", asked[3]),
        ("learn", asked[2], -2.0),
        ("learn", asked[3], -3.0),
    ]


def test_outcomes_hold_the_prediction_made_then_and_both_versions() -> None:
    """An outcome repeats output and version of its question, and tells the version after learning."""
    rows = [{"id": i, "t": i, "y": i} for i in range(4)]
    records, _ = run(job(Recorder(), label=Label(field="y", delay=2)), rows)
    asked = {p.id: p for p in predictions(records)}
    assert [(o.version, o.version_after) for o in outcomes(records)] == [(0, 1), (0, 2), (1, 3), (2, 4)]
    for outcome in outcomes(records):
        question = asked[outcome.id]
        assert (outcome.output, outcome.version, outcome.time) == (question.output, question.version, question.time)
    assert {p.model for p in predictions(records)} == {"Recorder"}


def test_the_declared_model_is_not_touched() -> None:
    """A job works with a copy, so that playing it twice gives the same."""
    model = Recorder()
    declared = job(model)
    rows = [{"id": i, "t": i, "y": i} for i in range(3)]
    first, second = list(declared.play(rows)), list(declared.play(rows))
    assert model.calls == []
    assert first == second


def test_missing_features_are_left_out_and_shown_as_none() -> None:
    """None is not passed to the model, neither when asked nor when taught; the record says that it was missing."""
    rows = [{"id": 1, "t": 1, "x": None, "y": 1}, {"id": 2, "t": 2, "x": 0, "y": 1}]
    records, plain = run(job(Recorder()), rows)
    assert [p.features for p in predictions(records)] == [{"x": None}, {"x": 0.0}]
    calls = plain.learner.models()[None][0].calls
    assert [call[1] for call in calls] == [{}, {}, {"x": 0.0}, {"x": 0.0}]


def test_features_come_in_the_order_of_their_declaration() -> None:
    """Keyed and other features may be mixed; names and values follow the declaration."""
    features = [
        Entity("key", [Count(), Mean("x")], over=["1h", "2h"]),
        Derived(twice),
        Entity(["key", "id"], [Count()], over="1h"),
        Fields("x"),
    ]
    declared = job(Recorder(), features=features)
    records, plain = run(declared, [{"id": 1, "t": 1, "x": 3}])
    (prediction,) = predictions(records)
    assert tuple(prediction.features) == declared.feature_names
    assert prediction.features["twice"] == 6.0
    assert prediction.features["x"] == prediction.features["x_mean_2h_by_key"] == 3.0
    assert tuple(plain.learner.models()[None][0].calls[0][1]) == declared.feature_names


def twice(event: Ask) -> float:
    """A feature."""
    return 2 * (event.x or 0)


def test_a_model_that_fails_rejects_the_question_and_the_job_goes_on() -> None:
    """A question that the model cannot answer is a `model_error`, learned neither; the next is answered."""
    rows = [{"id": i, "t": i, "x": x, "y": 0} for i, x in enumerate((3, 1, 2))]
    records, plain = run(job(Moody()), rows)
    assert [(p.id, p.output) for p in predictions(records)] == [(0, 0.5), (2, 1.0)]
    (reject,) = rejects(records)
    assert (reject.reason, reject.place) == ("model_error", "event 1")
    assert "ZeroDivisionError" in reject.detail
    assert b"1.0" in reject.original_bytes()
    assert [o.id for o in outcomes(records)] == [0, 2]
    assert len(plain.learner) == 0


def test_a_model_that_fails_to_learn_rejects_the_answer_and_keeps_its_version() -> None:
    """What was not learned does not count as learned and has no outcome."""
    rows = [{"id": i, "t": i, "x": 3, "y": y} for i, y in enumerate((0, 1, 2))]
    records, plain = run(job(Moody()), rows)
    assert len(predictions(records)) == 3
    assert [(o.id, o.version_after) for o in outcomes(records)] == [(0, 1), (2, 2)]
    assert [r.reason for r in rejects(records)] == ["model_error"]
    assert rejects(records)[0].detail.startswith("learning: ZeroDivisionError")
    assert plain.learner.models()[None][1] == 2


# -- kinds of models


def test_a_regressor_gives_a_value() -> None:
    """The output is the number that river gives."""
    rows = [{"id": i, "t": i, "y": i} for i in range(3)]
    records, _ = run(job(dummy.StatisticRegressor(stats.Mean())), rows)
    assert [p.output for p in predictions(records)] == [0.0, 0.0, 0.5]


def test_a_binary_classifier_gives_the_probability_of_true() -> None:
    """With a bool label the output is one number; before any label was seen it is what the model implies."""
    rows = [{"id": i, "t": i, "x": i, "y": i % 2 == 0} for i in range(6)]
    records, _ = run(job(preprocessing.StandardScaler() | linear_model.LogisticRegression(), Sorted), rows)
    outputs = [p.output for p in predictions(records)]
    assert outputs[0] == 0.5
    assert all(type(output) is float and 0 <= output <= 1 for output in outputs)
    records, _ = run(job(naive_bayes.GaussianNB(), Sorted), rows)
    assert [p.output for p in predictions(records)][:2] == [0.0, 1.0]


def test_a_classifier_of_more_labels_gives_a_distribution() -> None:
    """With labels of text the output is what the model says of each; at first nothing."""
    rows = [{"id": i, "t": i, "y": y} for i, y in enumerate(("a", "b", "c", "a"))]
    records, _ = run(job(dummy.PriorClassifier(), Named), rows)
    assert [p.output for p in predictions(records)] == [
        {}, {"a": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    ]  # fmt: skip


class Labeller(base.Classifier):
    """A classifier without probabilities."""

    def predict_one(self, x: dict[Any, Any], **kwargs: Any) -> Any:
        return x["x"] > 1

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        return


def test_a_classifier_without_probabilities_gives_its_label() -> None:
    """What cannot say how sure it is says its label."""
    records, _ = run(job(Labeller(), Sorted), [{"id": i, "t": i, "x": i} for i in range(3)])
    assert [p.output for p in predictions(records)] == [False, False, True]


def test_an_anomaly_detector_learns_from_questions_and_is_scored_by_labels() -> None:
    """The score comes first, then the detector learns at once; labels change no version."""
    model = anomaly.HalfSpaceTrees(n_trees=3, height=3, window_size=2, seed=1)
    rows = [{"id": i, "t": i, "x": i / 10} for i in range(6)]
    records, _ = run(job(model, label=Label(field="y", delay=3)), rows)
    oracle = anomaly.HalfSpaceTrees(n_trees=3, height=3, window_size=2, seed=1)
    for number, prediction in enumerate(predictions(records)):
        assert (prediction.output, prediction.version) == (oracle.score_one(prediction.features), number)
        oracle.learn_one(prediction.features)
    assert [(o.version, o.version_after) for o in outcomes(records)][:2] == [(0, 3), (1, 4)]


# -- models per key


def test_a_model_for_each_key_learns_from_its_own_only() -> None:
    """With `per` each value has a model, named by it, with a version of its own; falsy keys are keys."""
    rows = [{"id": i, "t": i, "key": key, "y": y} for i, (key, y) in enumerate([("a", 1), ("", 5), ("a", 3), ("", 7)])]
    records, plain = run(job(dummy.StatisticRegressor(stats.Mean()), per="key"), rows)
    assert [(p.model, p.version, p.output) for p in predictions(records)] == [
        ("StatisticRegressor/key=a", 0, 0.0),
        ("StatisticRegressor/key=", 0, 0.0),
        ("StatisticRegressor/key=a", 1, 1.0),
        ("StatisticRegressor/key=", 1, 5.0),
    ]
    assert {key: version for key, (_, version) in plain.learner.models().items()} == {"a": 2, "": 2}


def test_models_per_two_fields_are_named_by_both() -> None:
    """A compound key names all of its parts."""
    records, _ = run(job(Recorder(), per=("key", "id")), [{"id": 0, "t": 1, "key": "b"}])
    assert predictions(records)[0].model == "Recorder/key=b,id=0"


def test_there_are_no_more_models_than_declared() -> None:
    """A question for one too many is a reject, its label is dropped, the others are answered."""
    rows = [{"id": i, "t": i, "key": key, "y": 1} for i, key in enumerate("abcab")]
    records, plain = run(job(Recorder(), per="key", max_models=2), rows)
    assert [p.id for p in predictions(records)] == [0, 1, 3, 4]
    assert [(r.reason, r.place) for r in rejects(records)] == [("too_many_models", "events:3")]
    assert [o.id for o in outcomes(records)] == [0, 1, 3, 4]
    assert len(plain.learner) == 0


PER: dict[Any, tuple[Any, str]] = {
    None: (None, "Recorder"),
    "key": ("k", "Recorder/key=k"),
    "id": (7, "Recorder/id=7"),
    ("key", "id"): (("k", 7), "Recorder/key=k,id=7"),
}
"""By what a job may declare as `per`: the key of a model, and its name."""


@pytest.mark.parametrize(("before", "now"), list(permutations(PER, 2)))
def test_questions_asked_under_another_per_are_scored_and_teach_nobody(tmp_path: Path, before: Any, now: Any) -> None:
    """Their outcomes name the model that answered, at its version then; no model learns from them."""
    asked, answers = job(Recorder(), per=before), job(Recorder(), per=now)
    shelf = FileShelf(tmp_path / "state", names_of(asked))
    learner = Learner(asked, shelf.rows("learner"))
    ask = [(QUESTION, n, n, n, n, n, False, PER[before][0], (0.5,), None) for n in range(1, 5)]
    learner.process([*ask, (ANSWER, 5, 1, 2.0, 50, False)], [])
    shelf.write(1, "learner", learner.changes(), True)
    shelf.commit(1)
    for number in (2, 3, 4):
        shelf = shelf.again()
        learner = Learner(answers, shelf.rows("learner"), begun=2)
        assert [question for question, _ in learner.open_questions()] == list(range(number, 5))
        ((_, outcome, *_),) = learner.process([(ANSWER, 1, number, 2.0, 50, False)], [])
        assert isinstance(outcome, Outcome)
        assert (outcome.id, outcome.output, outcome.label) == (number, float(number), 2.0)
        assert (outcome.model, outcome.version, outcome.version_after) == (PER[before][1], 0, 0)
        assert learner.models() == {}
        shelf.write(number, "learner", learner.changes(), True)
        shelf.commit(number)
    said = learner.process([(QUESTION, 1, 5, 0, 5, 60, False, PER[now][0], (0.5,), None)], [])
    said += learner.process([(ANSWER, 1, 5, 2.0, 70, False)], [])
    for _, record, *_ in said:
        assert isinstance(record, Prediction | Outcome)
        assert (record.model, record.version) == (PER[now][1], 0)
    assert len(said) == 2
    assert learner.models()[PER[now][0]][1] == 1
    shelf.close()


def spread(declared: Job, rows: list[dict[str, Any]], groups: int) -> list[Any]:
    """What `play` does, with entities and models spread over key groups as the engine spreads them."""
    reader = Reader(inputs_of(declared, rows), declared.time, batch_size=3)
    admit = Admit(declared, groups)
    features = {(i, g): entity_features(declared, e) for i, e in enumerate(declared.entities) for g in range(groups)}
    learners = {group: Learner(declared) for group in range(groups)}
    records: list[Any] = []
    while not reader.finished:
        batch = reader.next_batch()
        assert batch is not None
        work = admit.admit(batch)
        columns = empty_columns(empties_of(declared), work.questions)
        for (index, group), asked in work.features.items():
            for place, answer in zip(*answer_rows(features[index, group], asked), strict=True):
                columns[index][place] = answer
        said = [one for g, operations in work.learners.items() for one in learners[g].process(operations, columns)]
        records += work.rejects
        records += [record for _, record, *_ in sorted(said, key=lambda one: one[0])]
    return records


@pytest.mark.parametrize("max_models", [100, 3])
def test_key_groups_change_no_result(max_models: int) -> None:
    """However many key groups there are, the same models give the same answers, at their bound too."""
    features = [Fields("x"), Entity("key", [Count(), Mean("x")], over="1h")]
    declared = job(dummy.StatisticRegressor(stats.Mean()), per="key", features=features, max_models=max_models)
    rows = [{"id": i, "t": i, "key": "abcdef"[i % 6], "x": i, "y": i} for i in range(24)]
    events = Memory(event=declared.events.event, items=rows, name="events")
    plain = PlainRun(declared, Reader([(EVENT, events)], declared.time, batch_size=3))
    expected = [r for r in plain.run() if isinstance(r, Prediction | Outcome | Reject)]
    for groups in (1, 2, 5, 16):
        assert spread(declared, rows, groups) == expected


def test_a_model_starts_from_a_pickle_round_trip() -> None:
    """A model must behave the same before and after a checkpoint, so it enters service through one."""
    rows = [{"id": i, "t": i, "x": i, "y": i % 2 == 0} for i in range(30)]
    declared = job(tree.HoeffdingTreeClassifier(grace_period=5), Sorted)
    learner = Learner(declared)
    outputs = [p.output for p in predictions(run(declared, rows)[0])]
    oracle = pickle.loads(pickle.dumps(declared.model))
    for event, output in zip(rows, outputs, strict=True):
        x = {"x": float(str(event["x"]))}
        assert output == oracle.predict_proba_one(x).get(True, 0.0)
        oracle.learn_one(x, event["y"])
    assert learner.models() == {}


# -- refused


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (preprocessing.StandardScaler(), ["StandardScaler", "cannot answer", "Hint"]),
        (preprocessing.StandardScaler() | preprocessing.MinMaxScaler(), ["MinMaxScaler", "cannot answer"]),
        (neighbors.LazySearch(), ["LazySearch"]),
        (anomaly.HalfSpaceTrees(), ["HalfSpaceTrees", "unseeded", "Hint", "seed=1"]),
        (preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(), ["Pipeline.HalfSpaceTrees", "unseeded"]),
        ("a model", ["str", "cannot answer"]),
        (None, ["NoneType"]),
    ],
)
def test_models_that_cannot_answer_the_same_way_twice_are_refused(model: Any, words: list[str]) -> None:
    """No unseeded randomness anywhere in a pipeline, and its end must be able to answer."""
    with pytest.raises((JobError, ValueError), match="Job: ") as caught:
        job(model)
    for word in words:
        assert word in str(caught.value)


def test_a_model_that_cannot_be_pickled_is_refused() -> None:
    """What cannot be checkpointed is told when the job is declared."""
    with pytest.raises(JobError, match="cannot be pickled"):
        job(preprocessing.StandardScaler() | dummy.StatisticRegressor(Unpicklable()))


class Unpicklable(stats.Mean):
    def __init__(self) -> None:
        super().__init__()
        self.held = lambda: None
