"""Millrace: online machine learning as one stateful stream job.

Declare a job, then play it in a notebook (`job.play()`), run it (`millrace run`) or backtest it (`millrace backtest`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataflows.connectors import Csv, Jsonl, Kafka, Security, Stdin, Stdout
    from dataflows.events import Event, Message, Metrics, ModelVersion, Outcome, Prediction, Record, Reject
    from dataflows.job import DISCARD, Audit, Job, JobError, Label, Outputs, Report
    from dataflows.order import Time

_MODULES = {
    "dataflows.connectors": ("Csv", "Jsonl", "Kafka", "Security", "Stdin", "Stdout"),
    "dataflows.events": (
        "Event", "Message", "Metrics", "ModelVersion", "Outcome", "Prediction", "Record", "Reject",
    ),
    "dataflows.job": ("DISCARD", "Audit", "Job", "JobError", "Label", "Outputs", "Report"),
    "dataflows.order": ("Time",),
}  # fmt: skip

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DISCARD",
    "Audit",
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


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: river brings scipy along, and not every command should wait for that."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
