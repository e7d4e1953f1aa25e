"""Jobs for the Kafka tests; which topics, and how, comes from the environment, as workers load them anew."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from river import linear_model, metrics, preprocessing

from dataflows import Event, Job, Jsonl, Kafka, Label, Outputs, Report, Time
from features import Count, Entity, Fields, Mean

HOUR = 3600


class Payment(Event, id="id", time="at", unit="s"):
    id: int
    at: int
    card: str
    amount: float


class Chargeback(Event, id="id", time="at", unit="s"):
    id: int
    at: int
    fraud: bool


def _job(events: Any, labels: Any, outputs: Outputs) -> Job:
    order: Any = os.environ.get("ORDER", "event_time")
    return Job(
        name="kept",
        events=events,
        features=[
            Fields("amount"),
            Entity("card", [Count(), Mean("amount")], over=os.environ.get("WINDOW", "1h")),
            Entity("card", [Mean("fraud")], over="1d", of="labels"),
        ],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(labels, field="fraud", horizon="1h", otherwise=False),
        metrics=[metrics.ROCAUC()],
        report=Report(outcomes=500),
        time=Time(order=order, lateness="1d" if order == "arrival" else 0, idle=float(os.environ.get("IDLE", "1"))),
        outputs=outputs,
    )


def on_kafka() -> Job:
    """Topics in, topics out: TOPICS names payments, chargebacks, predictions, outcomes, rejects, and models."""
    payments, chargebacks, *outputs = os.environ["TOPICS"].split(",")
    how: dict[str, Any] = {
        "mode": os.environ.get("MODE", "immediate"),
        "timeout": float(os.environ.get("PATIENCE", 60)),
    }
    start: Any = os.environ.get("START", "earliest")
    return _job(
        Kafka(payments, Payment, start=start, group=os.environ.get("GROUP"), timeout=how["timeout"]),
        Kafka(chargebacks, Chargeback, timeout=how["timeout"]),
        Outputs(
            **{
                kind: Kafka(topic, **how)
                for kind, topic in zip(("predictions", "outcomes", "rejects", "models"), outputs, strict=False)
            }
        ),
    )


def from_kafka() -> Job:
    """Topics in, files out."""
    payments, chargebacks = os.environ["TOPICS"].split(",")[:2]
    return _job(Kafka(payments, Payment), Kafka(chargebacks, Chargeback), Outputs())


def on_files() -> Job:
    """The same job on files in the directory FILES."""
    directory = Path(os.environ["FILES"])
    events, labels = Jsonl(directory / "payments.jsonl", Payment), Jsonl(directory / "chargebacks.jsonl", Chargeback)
    return _job(events, labels, Outputs())


def payments(count: int, seed: int = 1, first: int = 0) -> list[dict[str, Any]]:
    """Payments, one a second."""
    rng = random.Random(f"{seed} payments {first}")
    return [
        {"id": i, "at": 1000 + i, "card": f"c{rng.randrange(50)}", "amount": round(rng.uniform(1, 50), 2)}
        for i in range(first, first + count)
    ]


def chargebacks(of: list[dict[str, Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Chargebacks for half of them, a minute to 50 minutes later, in the order of their times."""
    rng = random.Random(f"{seed} chargebacks")
    told = [row for row in of if rng.random() < 0.5]
    rows = [{"id": row["id"], "at": row["at"] + rng.randrange(60, 3000), "fraud": row["amount"] > 40} for row in told]
    return sorted(rows, key=lambda row: (row["at"], row["id"]))
