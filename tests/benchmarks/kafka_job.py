"""The fraud job between two topics, for the Kafka benchmark: TOPICS names input, predictions and outcomes.

With LIVE it answers payments as they come, in order of arrival; event times are the moments at which they were sent.
"""

from __future__ import annotations

import os

from dataflows import Job, Kafka, Label, Outputs, Time
from examples.fraud.job import Transaction
from examples.fraud.job import job as fraud


def job() -> Job:
    """The job; with FILES it writes to files, as the one it is compared with."""
    payments, predictions, outcomes = os.environ["TOPICS"].split(",")
    outputs = Outputs(metrics=None, rejects=None)
    if "FILES" not in os.environ:
        topics = {"predictions": Kafka(predictions), "outcomes": Kafka(outcomes)}
        outputs = Outputs(metrics=None, rejects=None, **topics)
    changed = fraud.changed(events=Kafka(payments, Transaction), outputs=outputs)
    if "LIVE" in os.environ:
        return changed.changed(time=Time(order="arrival", lateness="1m"), label=Label(field="fraud", delay="30s"))
    return changed
