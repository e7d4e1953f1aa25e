"""Card payments from a simulator: answer each payment with its probability of fraud, learn when chargebacks come.

    millrace run examples/payments/job.py

The payments and chargebacks are made on the first run (seeded, always the same) and kept. A chargeback comes hours to
days after its payment, or never: after 7 days a payment without one counts as good.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from bytewax.dataflow import Dataflow
from river import compose, linear_model, metrics, preprocessing, utils

from dataflows import Event, Job, Jsonl, Label, Report
from dataflows.flow import dataflow
from examples.payments.simulate import write
from features import Entity, Fields, Mean, Sum

# Beside what runs write and named by its size: --fresh does not touch it, another size is another directory.
DATA = Path("runs/payments/60-days-500-customers")


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


def compared(x: dict[str, Any]) -> dict[str, Any]:
    """The amount as a multiple of what the card usually spends, in place of the mean."""
    rest = {name: value for name, value in x.items() if name != "amount_mean_28d_by_card_id"}
    return rest | {"times_usual": x["amount"] / x["amount_mean_28d_by_card_id"]}


def job() -> Job:
    """The job; its payments are simulated when they are not there."""
    if not (DATA / "chargebacks.jsonl").exists():
        write(DATA, days=60, customers=500, terminals=400)
    return Job(
        name="payments",
        events=Jsonl(DATA / "payments.jsonl", Payment),
        features=[
            Fields("amount"),
            Entity("card_id", [Mean("amount")], over="28d"),
            Entity("card_id", [Sum("fraud")], over="7d", of="labels", name="reported_card"),
            Entity("terminal_id", [Sum("fraud")], over=["7d", "28d"], of="labels"),
        ],
        model=compose.FuncTransformer(compared) | preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(Jsonl(DATA / "chargebacks.jsonl", Chargeback), field="fraud", horizon="7d", otherwise=False),
        metrics=[
            metrics.ROCAUC(n_thresholds=50),
            utils.Rolling(metrics.ROCAUC, window_size=10_000, n_thresholds=50),
            metrics.LogLoss(),
        ],
        report=Report(period="1d"),
    )


def flow() -> Dataflow:
    """For `python -m bytewax.run examples.payments.job:flow`."""
    return dataflow(job())
