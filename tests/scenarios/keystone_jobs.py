"""The jobs of the keystone test: four kinds of models, both orders; events and labels by --data and --labels."""

from __future__ import annotations

from functools import partial
from typing import Any

from river import anomaly, forest, linear_model, metrics, preprocessing, tree

from dataflows import Event, Job, Jsonl, Label, Report, Time
from features import Count, Entity, Fields, Mean


class Sale(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    card: str
    shop: str
    amount: float


class Verdict(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: bool


def linear() -> Any:
    """A linear model."""
    return preprocessing.StandardScaler() | linear_model.LogisticRegression()


def hoeffding() -> Any:
    """A tree."""
    return tree.HoeffdingTreeClassifier(grace_period=50)


def seeded_forest() -> Any:
    """A forest with randomness."""
    return forest.ARFClassifier(n_models=3, seed=1)


def half_space() -> Any:
    """An anomaly detector."""
    return preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(n_trees=5, height=4, window_size=50, seed=42)


MODELS = {"linear": linear, "hoeffding": hoeffding, "seeded_forest": seeded_forest, "half_space": half_space}
ORDERS = ("event_time", "arrival")
HORIZON = "3h"


def keystone(model: str, order: Any) -> Job:
    """The job of a model and an order."""
    return Job(
        name=f"keystone-{model}-{order}",
        events=Jsonl("events.jsonl", Sale),
        features=[
            Fields("amount"),
            Entity("card", [Count(), Mean("amount")], over=["1h", "6h"]),
            Entity("shop", [Count(), Mean("y")], over=["6h"], of="labels"),
        ],
        model=MODELS[model](),
        label=Label(Jsonl("labels.jsonl", Verdict), field="y", horizon=HORIZON, otherwise=False, early="30d"),
        metrics=[metrics.ROCAUC()],
        report=Report(outcomes=100),
        time=Time(order=order, lateness="10m", idle=3600.0),
    )


def per_shop() -> Job:
    """A model for each shop, spread over key groups."""
    return keystone("hoeffding", "arrival").model_copy(update={"name": "per-shop", "per": ("shop",)})


for _model in MODELS:
    for _order in ORDERS:
        globals()[f"{_model}_{_order}"] = partial(keystone, _model, _order)
