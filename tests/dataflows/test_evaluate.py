"""Metrics: delayed progressive validation as river does it, rolling ones, and when they are reported."""

from __future__ import annotations

import datetime as dt
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import base, compose, dummy, evaluate, linear_model, metrics, preprocessing, stats, utils

from dataflows import Event, Job, JobError, Label, Metrics, Outcome, Report
from dataflows.connectors import Memory
from dataflows.evaluate import Evaluator, Publisher, metric_name, most_probable
from dataflows.events import reject
from features import Fields
from features.rows import MemoryRows

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Ask(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: float = 0.0
    y: bool = False


class Amount(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: float = 0.0
    y: float = 0.0


class Named(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    x: float = 0.0
    y: str = ""


def job(model: Any, measures: list[Any], event: type[Event] = Ask, delay: Any = 0, **more: Any) -> Job:
    """A small job with metrics."""
    return Job(
        name="measured",
        events=Memory(event=event, items=[]),
        features=[Fields("x")],
        model=model,
        label=Label(field="y", delay=delay),
        metrics=measures,
        **more,
    )


def reports(job: Job, rows: list[dict[str, Any]]) -> list[Metrics]:
    """The reports of a run."""
    return [r for r in job.play(rows) if isinstance(r, Metrics)]


def linear() -> Any:
    """A model that gives probabilities."""
    return preprocessing.StandardScaler() | linear_model.LogisticRegression()


def river_says(rows: list[dict[str, Any]], model: Any, metric: Any, delay: int) -> float:
    """`progressive_val_score` of river for the same rows, in order of time, labels `delay` seconds late."""
    start = dt.datetime(1970, 1, 1)  # noqa: DTZ001 - river compares it with times without a zone
    stream: list[Any] = [({"x": float(r["x"]), "at": start + dt.timedelta(seconds=r["t"])}, r["y"]) for r in rows]
    whole = compose.Select("x") | model
    evaluate.progressive_val_score(stream, whole, metric, moment="at", delay=dt.timedelta(seconds=delay))
    return float(metric.get())


@settings(max_examples=25)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 5), st.booleans()), min_size=2, max_size=30),
    delay=st.integers(0, 20),
)
def test_metrics_are_those_of_progressive_val_score(steps: list[tuple[int, int, bool]], delay: int) -> None:
    """For probabilities and for labels, with any delay, to the last bit."""
    rows, now = [], 0
    for id, (gap, x, y) in enumerate(steps):
        now += gap
        rows.append({"id": id, "t": now, "x": x, "y": y})
    found = reports(job(linear(), [metrics.ROCAUC(), metrics.LogLoss(), metrics.Accuracy()], delay=f"{delay}s"), rows)
    for metric in (metrics.ROCAUC(), metrics.LogLoss(), metrics.Accuracy()):
        assert found[-1].values[type(metric).__name__] == river_says(rows, linear(), metric, delay)


def kept(evaluator: Evaluator) -> Any:
    """Its state as it comes back from disk."""
    return pickle.loads(pickle.dumps(evaluator.state()))


ROC_CASES = st.tuples(
    st.booleans(), st.sampled_from([0.0, 1 / 9, 2 / 9, 0.5, 8 / 9, 1.0, -0.1, 1.1]) | st.floats(-1, 2), st.booleans()
)


@given(st.lists(ROC_CASES, max_size=40), st.sampled_from([None, 0]), st.integers(2, 12))
def test_roc_auc_is_that_of_river_at_any_moment(
    outcomes: list[tuple[bool, float, bool]], positive: int | None, thresholds: int
) -> None:
    """For scores on, between and beyond the thresholds, as number or distribution, whenever it is looked at."""
    declared: Any = {"n_thresholds": thresholds} | ({} if positive is None else {"pos_val": positive})
    evaluator = Evaluator(job(linear(), [metrics.ROCAUC(**declared)]))
    oracle = metrics.ROCAUC(**declared)
    for label, score, look in outcomes:
        output: Any = {True: score, False: 1 - score} if look else score
        evaluator.add(label, output, 0)
        oracle.update(label, output)
        if look:
            assert evaluator.values() == {"ROCAUC": oracle.get()}
            evaluator = Evaluator(job(linear(), [metrics.ROCAUC(**declared)]), kept(evaluator))
    assert evaluator.values() == {"ROCAUC": oracle.get()}


def test_opinions_that_a_model_does_not_have_are_not_scored() -> None:
    """A classifier that has seen no label says nothing; river leaves that out, and so do we; it is an outcome still."""
    rows = [{"id": i, "t": i, "x": 0, "y": y} for i, y in enumerate("aab")]
    (last,) = reports(job(dummy.PriorClassifier(), [metrics.Accuracy()], Named), rows)
    assert last.values["Accuracy"] == 0.5 == river_says(rows, dummy.PriorClassifier(), metrics.Accuracy(), 0)
    assert last.outcomes == 3


class Zero(base.Regressor):
    def predict_one(self, x: dict[Any, Any]) -> float:
        return 0.0

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        return


def test_rolling_metrics_see_the_last_outcomes_only() -> None:
    """The mean error of the last two, beside that of all."""
    measures = [metrics.MAE(), utils.Rolling(metrics.MAE, window_size=2)]
    rows = [{"id": i, "t": i, "y": y} for i, y in enumerate((8, 0, 0, 0))]
    declared = job(Zero(), measures, Amount, report=Report(outcomes=1))
    found = [m.values for m in reports(declared, rows)]
    assert [v["MAE_rolling_2"] for v in found] == [8.0, 4.0, 0.0, 0.0]
    assert [v["MAE"] for v in found] == pytest.approx([8.0, 4.0, 8 / 3, 2.0])


def test_rolling_metrics_are_named_by_their_window() -> None:
    """A rolling metric stands beside the one over everything."""
    assert metric_name(utils.Rolling(metrics.MAE, window_size=10)) == "MAE_rolling_10"
    assert metric_name(metrics.MAE()) == "MAE"


def test_metrics_of_one_name_are_numbered() -> None:
    """Nothing is overwritten when a metric is declared twice."""
    rows = [{"id": i, "t": i, "y": bool(i % 2), "x": i} for i in range(10)]
    measures = [metrics.FBeta(0.5), metrics.FBeta(2), metrics.Accuracy()]
    (last,) = reports(job(linear(), measures), rows)
    assert list(last.values) == ["FBeta_1", "FBeta_2", "Accuracy"]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (7, [5])])
def test_reports_come_every_so_many_outcomes_and_at_the_end(every: int, expected: list[int]) -> None:
    """The last report covers everything; it is not given twice."""
    rows = [{"id": i, "t": i} for i in range(5)]
    found = reports(job(linear(), [metrics.Accuracy()], report=Report(outcomes=every)), rows)
    assert [m.outcomes for m in found] == expected
    assert found[-1].time == EPOCH + dt.timedelta(seconds=4)


def test_reports_come_every_period_of_event_time() -> None:
    """A report covers the periods before the first outcome of a later one; empty periods give none."""
    rows = [{"id": i, "t": t} for i, t in enumerate((0, 30, 59, 60, 61, 200))]
    found = reports(job(linear(), [metrics.Accuracy()], report=Report(period="1m")), rows)
    assert [(m.outcomes, m.time - EPOCH) for m in found] == [
        (3, dt.timedelta(seconds=59)),
        (5, dt.timedelta(seconds=61)),
        (6, dt.timedelta(seconds=200)),
    ]


def test_there_is_no_report_without_outcomes() -> None:
    """Questions alone measure nothing."""
    assert reports(job(linear(), [metrics.Accuracy()]), []) == []


def test_a_metric_that_is_not_defined_yet_is_none() -> None:
    """Infinities and NaN are no values; R2 of one outcome is not known."""
    evaluator = Evaluator(job(dummy.StatisticRegressor(stats.Mean()), [metrics.MAPE(), NotANumber()], Amount))
    evaluator.add(1.0, 1.0, 0)
    assert evaluator.values() == {"MAPE": 0.0, "NotANumber": None}


class NotANumber(metrics.MAE):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def get(self) -> float:
        return float("nan")


@pytest.mark.parametrize("metric", [metrics.ConfusionMatrix(), metrics.ClassificationReport()])
def test_metrics_that_are_no_single_number_do_not_stop_a_job(metric: Any) -> None:
    """They are refused when the job is declared, or reported somehow; the job does not die at the first report."""
    try:
        declared = job(linear(), [metric])
    except JobError as error:
        if type(metric).__name__ not in str(error):
            raise
        return
    assert len(reports(declared, [{"id": i, "t": i, "x": i, "y": i % 2 == 0} for i in range(4)])) == 1


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(0, 10**9)), max_size=20), st.integers(0, 20))
def test_an_evaluator_resumes_identically(outcomes: list[tuple[bool, float, int]], cut: int) -> None:
    """From its state, through bytes, it gives the same reports as without a break."""
    declared = job(linear(), [metrics.ROCAUC(), utils.Rolling(metrics.LogLoss, 3)], report=Report(period="1m"))
    straight = Evaluator(declared)
    expected = [straight.add(y, {True: p, False: 1 - p}, at) for y, p, at in outcomes]
    first = Evaluator(declared)
    found = [first.add(y, {True: p, False: 1 - p}, at) for y, p, at in outcomes[:cut]]
    second = Evaluator(declared, kept(first))
    found += [second.add(y, {True: p, False: 1 - p}, at) for y, p, at in outcomes[cut:]]
    assert (found, second.now()) == (expected, straight.now())


def test_the_most_probable_label_is_taken_from_a_distribution() -> None:
    """Anything that is no distribution is a label already; an empty one has none."""
    assert most_probable({0: 0.2, 1: 0.8}) == 1
    assert most_probable({False: 1.0}) is False
    assert most_probable({}) is None
    assert most_probable(0) == 0


def test_the_publisher_puts_records_of_all_learners_in_order() -> None:
    """Rejects first, then by position in the batch, whichever learner spoke; the counts tell what passed."""
    declared = job(linear(), [metrics.Accuracy()])
    publisher = Publisher(declared)
    outcome = [Outcome(i, EPOCH, 0.5, True, EPOCH, "M", 0, 1) for i in range(4)]
    said: list[Any] = [[(i, outcome[i], {True: 1.0}, 0, None) for i in group] for group in ([0, 3], [1, 2])]
    refused = reject("odd", "", "", b"")
    records = list(publisher.publish([refused], said, True))
    assert records[:5] == [refused, *outcome]
    assert records[5].values == {"Accuracy": 1.0}  # type: ignore[union-attr]
    assert +publisher.counts == {"rejects": 1, "rejects.odd": 1, "outcomes": 4, "reports": 1}
    rows = MemoryRows()
    rows.apply(publisher.changes())
    again = Publisher(declared, rows)
    assert list(again.publish([], [], True)) == [], "what was reported is not reported again"
