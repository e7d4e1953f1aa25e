"""Card payments from a simulator: answer each payment with its probability of fraud, learn when chargebacks come.

    millrace run examples/payments/job.py

The payments and chargebacks are made on the first run (seeded, always the same). A chargeback comes hours to days
after its payment, or never: after 14 days a payment without one counts as good.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from bytewax.dataflow import Dataflow
from river import linear_model, metrics, preprocessing, utils

from dataflows import Event, Job, Jsonl, Label, Report
from dataflows.flow import dataflow
from examples.payments.simulate import write
from features import Count, Derived, Entity, Fields, Mean, TimeSince


class Payment(Event, id="payment_id", time="paid_at"):
    payment_id: str
    paid_at: datetime
    card_id: str
    terminal_id: str
    amount: float


class Chargeback(Event, id="payment_id", time="reported_at"):
    payment_id: str
    reported_at: datetime
    fraud: bool


def is_night(payment: Payment) -> int:
    return int(payment.paid_at.hour < 6)


DATA = Path("runs/payments/data")
if not (DATA / "chargebacks.jsonl").exists():
    write(DATA)

job = Job(
    name="payments",
    events=Jsonl(DATA / "payments.jsonl", Payment),
    features=[
        Fields("amount"),
        Derived(is_night),
        Entity("card_id", [Count(), Mean("amount"), TimeSince()], over=["1d", "7d"]),
        Entity("terminal_id", [Count(), Mean("fraud")], over=["7d", "28d"], of="labels"),
    ],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(Jsonl(DATA / "chargebacks.jsonl", Chargeback), field="fraud", horizon="14d", otherwise=False),
    metrics=[metrics.ROCAUC(), utils.Rolling(metrics.ROCAUC, window_size=10_000), metrics.LogLoss()],
    report=Report(period="1d"),
)


def flow() -> Dataflow:
    """For `python -m bytewax.run examples.payments.job:flow`."""
    return dataflow(job)
