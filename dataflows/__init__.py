"""Millrace: online machine learning as one stateful stream job.

Declare a job, then play it in a notebook (`job.play()`), run it (`millrace run`) or backtest it (`millrace backtest`).
"""

from dataflows.connectors import Csv, Jsonl, Kafka, Security, Stdin, Stdout
from dataflows.events import Event, Message, Metrics, ModelVersion, Outcome, Prediction, Record, Reject
from dataflows.job import DISCARD, Job, JobError, Label, Outputs, Report
from dataflows.order import Time

__all__ = [
    "DISCARD",
    "Csv",
    "Event",
    "Job",
    "JobError",
    "Jsonl",
    "Kafka",
    "Label",
    "Message",
    "Metrics",
    "ModelVersion",
    "Outcome",
    "Outputs",
    "Prediction",
    "Record",
    "Reject",
    "Report",
    "Security",
    "Stdin",
    "Stdout",
    "Time",
]
