"""The jobs of the crash tests: every kind of label, window, model and order; inputs by --data and --labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from river import anomaly, forest, linear_model, metrics, preprocessing, tree, utils

from dataflows import DISCARD, Event, Job, Jsonl, Label, Report, Time
from features import (
    Count,
    Entity,
    EWMean,
    Fields,
    Hopping,
    Last,
    Max,
    Mean,
    NUnique,
    Quantile,
    Session,
    Std,
    Tiled,
    TimeSince,
    Tumbling,
)
from tests.chaos import switches
from tests.chaos.streams import Kind

switches.apply()

ORDERS = ("event_time", "arrival")


class Sale(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    card: str
    shop: str
    amount: float


class Labelled(Sale, id="id", time="t", unit="us"):
    y: bool | None
    delay: int


class Verdict(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: bool


def delay_of(sale: Labelled) -> int:
    """When the label is known, in microseconds after the event."""
    return sale.delay


def _time(order: Any) -> Time:
    return Time(order=order, lateness="10m", idle=3600.0)


def _verdicts(**named: Any) -> Label:
    return Label(Jsonl("labels.jsonl", Verdict), field="y", **named)


def fraud(order: Any) -> Job:
    """Labels in the event, known later; features of labels; every kind of window."""
    return Job(
        name=f"fraud-{order}",
        events=Jsonl("events.jsonl", Labelled),
        features=[
            Fields("amount"),
            Entity("card", [Count(), Mean("amount"), Std("amount")], over=["1h", "6h", Last(20), Tumbling("1h")]),
            Entity("shop", [Count(), Mean("y")], over=["6h", "1d"], of="labels"),
            Entity(["card", "shop"], [Max("amount"), Count()], over=[Session("2h"), Hopping("2h", hop="30m")]),
        ],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(field="y", delay=delay_of, horizon="3h", otherwise=False),
        metrics=[metrics.ROCAUC(), utils.Rolling(metrics.LogLoss, window_size=100)],
        report=Report(outcomes=50),
        time=_time(order),
    )


def verdicts(order: Any) -> Job:
    """A stream of labels, early, late, twice; small bounds on all that is remembered."""
    return Job(
        name=f"verdicts-{order}",
        events=Jsonl("events.jsonl", Sale),
        features=[
            Fields("amount"),
            Entity("card", [Count(), NUnique("shop"), TimeSince()], over=["6h"]),
            Entity("shop", [Count(), Mean("y")], over=["6h"], of="labels"),
        ],
        model=tree.HoeffdingTreeClassifier(grace_period=50),
        label=_verdicts(horizon="3h", otherwise=False, early="1d", max_early=15, max_open=60),
        metrics=[metrics.ROCAUC(), metrics.F1()],
        report=Report(period="1h"),
        time=_time(order),
        max_ids=300,
    )


def revised(order: Any) -> Job:
    """Labels that are corrected until the horizon, which is long: many questions wait."""
    return Job(
        name=f"revised-{order}",
        events=Jsonl("events.jsonl", Sale),
        features=[
            Fields("amount"),
            Entity("card", [EWMean("amount", halflife="2h"), Quantile("amount", 0.9)], ttl="12h"),
            Entity("shop", [Mean("amount")], over=[Tiled("12h", resolution="1h"), Last(5)]),
        ],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=_verdicts(horizon="2d", otherwise=DISCARD, revisions="last", early="1d"),
        metrics=[metrics.Accuracy()],
        report=Report(outcomes=20),
        time=_time(order),
    )


def shops(order: Any) -> Job:
    """A model for each shop, spread over key groups."""
    return verdicts(order).changed(name=f"shops-{order}", per=("shop",), max_ids=200_000)


def detector(order: Any) -> Job:
    """An anomaly detector: it learns from questions, labels only measure it."""
    model = preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(n_trees=5, height=4, window_size=50, seed=42)
    return verdicts(order).changed(name=f"detector-{order}", model=model, metrics=(metrics.ROCAUC(),))


def trees(order: Any) -> Job:
    """A forest with seeded randomness."""
    return fraud(order).changed(name=f"trees-{order}", model=forest.ARFClassifier(n_models=3, seed=1))


def forecast(order: Any) -> Job:
    """The label is in a later event of the same card."""
    return Job(
        name=f"forecast-{order}",
        events=Jsonl("events.jsonl", Labelled),
        features=[Fields("amount"), Entity("card", [Mean("amount"), Count()], over=["6h", Last(3)])],
        model=preprocessing.StandardScaler() | linear_model.LinearRegression(),
        label=Label(field="amount", after="1h", by="card", horizon="2d"),
        metrics=[metrics.MAE()],
        report=Report(outcomes=100),
        time=_time(order),
    )


class Declared(NamedTuple):
    """How a job is made, and the stream it wants."""

    job: Callable[[Any], Job]
    kind: Kind
    events: int


JOBS = {
    "fraud": Declared(fraud, "field", 5000),
    "verdicts": Declared(verdicts, "stream", 5000),
    "revised": Declared(revised, "stream", 5000),
    "shops": Declared(shops, "stream", 5000),
    "detector": Declared(detector, "stream", 5000),
    "trees": Declared(trees, "field", 2500),
    "forecast": Declared(forecast, "field", 6000),
}

for _name, _declared in JOBS.items():
    for _order in ORDERS:
        globals()[f"{_name}_{_order}"] = partial(_declared.job, _order)
