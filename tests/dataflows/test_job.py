"""Declaring a job: what is refused, with which words; names; leaks."""

from __future__ import annotations

import pickle
from datetime import datetime, timedelta
from typing import Any

import pytest
from river import cluster, dummy, linear_model, metrics, preprocessing, stats, utils

from dataflows import DISCARD, Csv, Event, Job, JobError, Jsonl, Label, Outputs, Report, Stdin, Time
from dataflows.connectors import Memory
from features import Count, Derived, Entity, Fields, Mean


class Payment(Event, id="id", time="at"):
    id: int
    at: datetime
    card: str
    shop: str
    amount: float
    fraud: bool


class Anonymous(Event, time="at"):
    at: datetime
    card: str
    amount: float


class Chargeback(Event, id="id", time="at"):
    id: int
    at: datetime
    card: str
    paid: datetime
    fraud: bool


class Nameless(Event, time="at"):
    at: datetime
    card: str
    paid: datetime
    fraud: bool


PAYMENTS = Memory(event=Payment, items=[])
CHARGEBACKS = Memory(event=Chargeback, items=[], name="labels")


def job(**changed: Any) -> Job:
    """A job that can run, with something changed."""
    declared: dict[str, Any] = {
        "name": "fraud",
        "events": PAYMENTS,
        "features": [Fields("amount"), Entity("card", [Count(), Mean("amount")], over="1d")],
        "model": preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        "label": Label(field="fraud", delay="7d"),
        "metrics": [metrics.ROCAUC()],
    }
    return Job(**(declared | changed))


def night(event: Payment) -> bool:
    """A feature."""
    return event.at.hour < 6


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "name with a slash": ({"name": "a/b"}, ["'a/b'", "letters, digits"]),
    "empty name": ({"name": ""}, ["''"]),
    "name of dots": ({"name": ".."}, ["'..'"]),
    "no features": ({"features": []}, ["no features", "Hint", "Fields"]),
    "unknown field": ({"features": [Fields("cents")]}, ["Payment", "'cents'", "amount, at, card"]),
    "unknown key": ({"features": [Entity("city", [Count()], over="1d")]}, ["'city'", "Payment"]),
    "unknown column": ({"features": [Entity("card", [Mean("cents")], over="1d")]}, ["'cents'"]),
    "same name twice": ({"features": [Fields("amount"), Fields("amount")]}, ["'amount'", "two features", "Hint"]),
    "label among the fields": ({"features": [Fields("fraud")]}, ["'fraud'", "Hint", "of='labels'"]),
    "label in an aggregate": ({"features": [Entity("card", [Mean("fraud")], over="1d")]}, ["'fraud'", "of='labels'"]),
    "label in a key": ({"features": [Entity(["card", "fraud"], [Count()], over="1d")]}, ["'fraud'", "Hint"]),
    "label as the key of models": ({"per": "fraud"}, ["'fraud'"]),
    "unknown per": ({"per": ("shop", "town")}, ["'town'", "per"]),
    "unknown label field": ({"label": Label(field="theft", delay=1)}, ["'theft'", "Payment"]),
    "unknown field of the delay": ({"label": Label(field="fraud", delay="soon")}, ["'soon'", "delay"]),
    "unknown by": ({"label": Label(field="fraud", after="1d", by="town")}, ["'town'", "by="]),
    "labels without id": (
        {"label": Label(Memory(event=Nameless, items=[], name="l"), field="fraud")},
        ["Payment", "Nameless", "matched by id", "Hint", "on="],
    ),
    "events without id": (
        {"events": Memory(event=Anonymous, items=[]), "label": Label(CHARGEBACKS, field="fraud")},
        ["Anonymous", "Chargeback", "Hint"],
    ),
    "unknown on": ({"label": Label(CHARGEBACKS, field="fraud", on="shop", at="paid")}, ["'shop'", "Chargeback"]),
    "unknown at": ({"label": Label(CHARGEBACKS, field="fraud", on="card", at="then")}, ["'then'", "Chargeback"]),
    "no metric": ({"metrics": ["ROCAUC"]}, ["'ROCAUC'", "Hint", "metrics.ROCAUC()"]),
    "class of a metric": ({"metrics": [metrics.ROCAUC]}, ["ROCAUC", "Hint"]),
    "metric of another kind": ({"metrics": [metrics.MAE()]}, ["MAE", "LogisticRegression"]),
    "model that only transforms": ({"model": preprocessing.StandardScaler()}, ["StandardScaler", "Hint"]),
    "model that clusters": ({"model": cluster.KMeans(seed=1)}, ["KMeans", "Hint"]),
    "class of a model": ({"model": linear_model.LogisticRegression}, ["cannot answer", "Hint"]),
    "unknown argument": ({"metric": []}, ["metric"]),
    "no ids at all": ({"max_ids": -1}, ["max_ids", "-1"]),
    "features that are none": ({"features": ["amount"]}, ["features", "amount"]),
    "label that is none": ({"label": "fraud"}, ["label", "fraud"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_job_that_cannot_run_is_refused_with_what_is_wrong(case: str) -> None:
    """The message names the value and says what would do."""
    changed, words = WRONG[case]
    with pytest.raises((JobError, ValueError), match=r"(?s).") as caught:
        job(**changed)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("changed", [{"name": "a/b"}, {"features": []}, {"model": None}, {"max_ids": -1}, {"more": 1}])
def test_what_is_raised_is_a_job_error(changed: dict[str, Any]) -> None:
    """One type for all that is wrong with a job, as documented, so that the command can show it as one message."""
    with pytest.raises(JobError):
        job(**changed)


LABELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no time": ({}, ["when the label is known", "Hint", "delay='7d'", "after='30m'"]),
    "delay and after": ({"delay": 1, "after": 1, "by": "card"}, ["delay=", "after="]),
    "after without by": ({"after": "1h"}, ["after=", "by="]),
    "by without after": ({"delay": 1, "by": "card"}, ["after=", "by="]),
    "on without at": ({"delay": 1, "on": "card"}, ["on=", "at="]),
    "otherwise without horizon": ({"delay": 1, "otherwise": False}, ["otherwise=", "Hint", "horizon="]),
    "otherwise None without horizon": ({"delay": 1, "otherwise": None}, ["otherwise=", "Hint", "horizon="]),
    "last without horizon": ({"delay": 1, "revisions": "last"}, ["revisions='last'", "Hint", "horizon="]),
    "horizon of no duration": ({"delay": 1, "horizon": "a week"}, ["'a week'"]),
    "negative horizon": ({"delay": 1, "horizon": -1}, ["-1"]),
    "negative delay": ({"delay": -1}, ["-1"]),
    "unknown revisions": ({"delay": 1, "revisions": "best"}, ["revisions", "best"]),
    "no open questions": ({"delay": 1, "max_open": 0}, ["max_open", "0"]),
    "unknown argument": ({"delay": 1, "late": 1}, ["late"]),
}


@pytest.mark.parametrize("case", LABELS)
def test_a_label_that_cannot_be_is_refused_with_what_is_wrong(case: str) -> None:
    """Kinds exclude each other, what belongs together comes together, and durations are durations."""
    changed, words = LABELS[case]
    with pytest.raises((JobError, ValueError), match=r"(?s).") as caught:
        Label(field="fraud", **changed)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("changed", [{"delay": "1d"}, {"after": "1d", "by": "card"}])
def test_a_stream_of_labels_has_its_own_times(changed: dict[str, Any]) -> None:
    """delay= and after= are for labels that have no stream."""
    with pytest.raises((JobError, ValueError), match="Hint"):
        Label(CHARGEBACKS, field="fraud", **changed)


def test_the_kind_of_a_label_follows_from_its_declaration() -> None:
    """A source, a delay or a later event."""
    assert Label(CHARGEBACKS, field="fraud").kind == "stream"
    assert Label(field="fraud", delay=0).kind == "field"
    assert Label(field="fraud", after=0, by="card").kind == "later"


def test_durations_become_microseconds() -> None:
    """Text, timedelta and integers mean the same."""
    label = Label(field="fraud", delay="1h", horizon=timedelta(days=7), early=5)
    assert (label.delay, label.horizon, label.early) == (3_600_000_000, 604_800_000_000, 5)


@pytest.mark.parametrize("wrong", [{}, {"outcomes": 1, "period": "1d"}, {"outcomes": 0}, {"period": "often"}])
def test_reports_come_by_outcomes_or_by_period(wrong: dict[str, Any]) -> None:
    """Exactly one of both."""
    with pytest.raises((JobError, ValueError), match=r"outcomes|often|period"):
        Report(**wrong)


@pytest.mark.parametrize("name", ["a", "A-1", "x_y", "0"])
def test_names_may_hold_letters_digits_dashes_and_underscores(name: str) -> None:
    """Such names are good for directories everywhere."""
    assert job(name=name).name == name


def test_a_name_ends_where_it_ends() -> None:
    """A line break is no part of a name."""
    with pytest.raises((JobError, ValueError), match="name"):
        job(name="fraud\n")


def test_names_of_features_follow_the_declaration() -> None:
    """In its order, whatever kinds are mixed."""
    features = [Entity("card", [Count()], over="1d"), Derived(night), Fields("amount")]
    declared = job(features=features)
    assert declared.feature_names == ("count_1d_by_card", "night", "amount")
    assert [e.key for e in declared.entities] == [("card",)]


def test_labels_may_be_seen_by_features_of_labels() -> None:
    """A label-derived feature of the same field is no leak, for no kind of label."""
    features = [Entity("shop", [Count(), Mean("fraud")], over="1d", of="labels")]
    for label in (Label(field="fraud", delay=1), Label(CHARGEBACKS, field="fraud")):
        assert job(features=features, label=label).feature_names == ("count_1d_by_shop", "fraud_mean_1d_by_shop")


def test_the_value_of_now_may_be_a_feature_of_a_forecast() -> None:
    """With a label in a later event, the field of this event is known."""
    declared = job(features=[Fields("amount")], label=Label(field="amount", after="1h", by="shop"), metrics=[],
                   model=dummy.StatisticRegressor(stats.Mean()))  # fmt: skip
    assert declared.feature_names == ("amount",)


def test_a_job_cannot_be_changed() -> None:
    """Declarations are frozen."""
    with pytest.raises(ValueError, match="frozen"):
        job().name = "other"


def test_discard_is_one_object_also_after_a_pickle_round_trip() -> None:
    """Identity is how it is told from labels."""
    assert pickle.loads(pickle.dumps(DISCARD)) is DISCARD
    assert repr(DISCARD) == "DISCARD"


def test_binary_is_told_from_the_type_of_the_label() -> None:
    """A bool gives one probability."""
    assert job().binary
    assert not job(label=Label(field="shop", delay=1), metrics=[]).binary


def test_the_model_is_named_by_its_last_step() -> None:
    """The scaler is not what answers."""
    assert job().model_name == "LogisticRegression"


def test_rolling_metrics_are_metrics() -> None:
    """Both kinds stand side by side."""
    assert len(job(metrics=[metrics.ROCAUC(), utils.Rolling(metrics.Accuracy, window_size=2)]).metrics) == 2


def test_play_takes_what_the_declaration_needs() -> None:
    """Labels of their own are asked for, and not taken where there are none."""
    with pytest.raises(ValueError, match=r"labels are a stream.*Hint"):
        job(label=Label(CHARGEBACKS, field="fraud")).play([])
    with pytest.raises(ValueError, match=r"labels in its events.*Hint"):
        job().play([], [])


@pytest.mark.parametrize("source", [Jsonl("a.jsonl", Payment), Csv("a.csv", Payment), Stdin(Payment)])
def test_sources_are_declared_with_their_event(source: Any) -> None:
    """Declaring opens nothing: the files need not be there yet."""
    assert job(events=source).events.event is Payment


def test_outputs_of_unknown_kinds_are_refused() -> None:
    """What is no kind of records has no output."""
    with pytest.raises(JobError, match="answers"):
        Outputs(answers=None)


def test_time_is_part_of_the_declaration() -> None:
    """Durations are checked where they are written."""
    assert Time(lateness="10m", max_jump="1d").lateness == 600_000_000
