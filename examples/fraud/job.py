"""Card fraud with the features of the Fraud Detection Handbook: a label that is known seven days after its transaction.

    millrace run examples/fraud/job.py --data transactions.jsonl.gz

Features and data: Le Borgne, Siblini, Lebichot, Bontempi, "Reproducible Machine Learning for Credit Card Fraud
Detection - Practical Handbook" (2022), chapters 3.3 and 3.4.
"""

from __future__ import annotations

from bytewax.dataflow import Dataflow
from river import linear_model, metrics, preprocessing

from dataflows import Event, Job, Jsonl, Label, Report
from dataflows.flow import dataflow
from features import Count, Derived, Entity, Fields, Mean


class Transaction(Event, id="tx_id", time="ts", unit="ms"):
    tx_id: int
    ts: int
    customer: int
    terminal: int
    amount: float
    fraud: bool


def is_night(event: Transaction) -> int:
    """Between midnight and 6:59 (the handbook counts the hour 6 in)."""
    return int(event.ts // 3_600_000 % 24 <= 6)


def is_weekend(event: Transaction) -> int:
    """Saturday or Sunday; day 0 of the epoch was a Thursday."""
    return int((event.ts // 86_400_000 + 3) % 7 >= 5)


job = Job(
    name="fraud",
    events=Jsonl("transactions.jsonl.gz", Transaction),
    features=[
        Fields("amount"),
        Derived(is_night),
        Derived(is_weekend),
        Entity("customer", [Count(), Mean("amount")], over=["1d", "7d", "30d"]),
        Entity("terminal", [Count(), Mean("fraud")], over=["1d", "7d", "30d"], of="labels"),
    ],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="fraud", delay="7d"),
    metrics=[metrics.ROCAUC()],
    report=Report(period="1d"),
)


def flow() -> Dataflow:
    """For `python -m bytewax.run examples.fraud.job:flow`."""
    return dataflow(job)
