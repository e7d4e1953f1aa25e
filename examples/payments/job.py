"""Card payments from a simulator: answer each payment with its probability of fraud, learn when chargebacks come.

    millrace run examples/payments/job.py
    millrace run examples/payments/job.py:on_kafka --kafka localhost:9092

The first reads files: the payments and chargebacks are made on the first run (seeded, always the same) and kept. The
second reads topics, which `produce.py` fills. A chargeback comes hours to days after its payment, or never: after 7
days a payment without one counts as good.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from bytewax.dataflow import Dataflow
from river import compose, linear_model, metrics, preprocessing, utils

from dataflows import Event, Job, Jsonl, Kafka, Label, Outputs, Report, Time
from dataflows.flow import dataflow
from dataflows.order import Source
from examples.payments.simulate import write
from features import Entity, Fields, Mean, Sum

# Beside what runs write and named by its size: --fresh does not touch it, another size is another directory.
DATA = Path("runs/payments/60-days-500-customers")

DAY = timedelta(seconds=10)
"""What a simulated day takes on Kafka."""


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
    mean = next(name for name in x if name.startswith("amount_mean"))  # ..._28d_by_card_id, on Kafka ..._280s_...
    rest = {name: value for name, value in x.items() if name != mean}
    return rest | {"times_usual": x["amount"] / x[mean]}


def job() -> Job:
    """The job on files; its payments are simulated when they are not there."""
    if not (DATA / "chargebacks.jsonl").exists():
        write(DATA, days=60, customers=500, terminals=400)
    payments, chargebacks = Jsonl(DATA / "payments.jsonl", Payment), Jsonl(DATA / "chargebacks.jsonl", Chargeback)
    return spot_fraud("payments", payments, chargebacks, day=timedelta(days=1))


def on_kafka(prefix: str = "", day: timedelta = DAY) -> Job:
    """The same job on topics, whose names may begin with a prefix; a day is as long as `produce.py` makes it."""
    return spot_fraud(
        "payments-on-kafka",
        Kafka(f"{prefix}payments", Payment),
        Kafka(f"{prefix}chargebacks", Chargeback),
        day,
        # Live, an answer is wanted at once: nothing waits for what may still be on its way in another partition. Some
        # payments are late all the same, after a hiccup of a broker for example: within a minute they are answered,
        # with the features of their time; later ones become rejects. A minute and no share of a day, because
        # transport takes as long as it takes, whatever is simulated.
        time=Time(order="arrival", lateness="1m"),
        # Metrics are few and for people: they stay in a file, runs/payments-on-kafka/metrics.jsonl.
        outputs=Outputs(
            predictions=Kafka(f"{prefix}scores"), outcomes=Kafka(f"{prefix}outcomes"), rejects=Kafka(f"{prefix}rejects")
        ),
    )


def spot_fraud(name: str, payments: Source, chargebacks: Source, day: timedelta, **live: Any) -> Job:
    """The job, wherever its events come from and however long a day takes."""
    return Job(
        name=name,
        events=payments,
        features=[
            Fields("amount"),
            Entity("card_id", [Mean("amount")], over=28 * day),
            Entity("card_id", [Sum("fraud")], over=7 * day, of="labels", name="reported_card"),
            Entity("terminal_id", [Sum("fraud")], over=[7 * day, 28 * day], of="labels"),
        ],
        model=compose.FuncTransformer(compared) | preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(chargebacks, field="fraud", horizon=7 * day, otherwise=False, early=day),
        metrics=[
            metrics.ROCAUC(n_thresholds=50),
            utils.Rolling(metrics.ROCAUC, window_size=10_000, n_thresholds=50),
            metrics.LogLoss(),
        ],
        report=Report(period=day),
        **live,
    )


def flow() -> Dataflow:
    """For `python -m bytewax.run examples.payments.job:flow`."""
    return dataflow(job())
