"""How many bikes will there be? Five stations of Toulouse; a reading's truth is known half an hour later.

millrace run examples/bikes/job.py --data toulouse_bikes.csv.gz
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bytewax.dataflow import Dataflow
from river import datasets, linear_model, metrics, optim, preprocessing

from dataflows import Csv, Event, Job, Label, Report
from dataflows.flow import dataflow
from features import Derived, Entity, Fields, Mean


class Reading(Event, time="moment"):
    moment: datetime
    bikes: int
    station: str
    clouds: int
    humidity: int
    pressure: float
    temperature: float
    wind: float


def hour(event: Reading) -> int:
    return event.moment.hour


def bikes(delay: Any = "30m", path: str = "toulouse_bikes.csv.gz") -> Job:
    """The job with the truth revealed after a delay."""
    return Job(
        name="bikes",
        events=Csv(path, Reading),
        features=[
            Fields("clouds", "humidity", "pressure", "temperature", "wind"),
            Derived(hour, feature=False),
            Entity(["station", "hour"], [Mean("bikes")], of="labels"),
        ],
        model=preprocessing.StandardScaler() | linear_model.LinearRegression(optimizer=optim.SGD(0.001)),
        label=Label(field="bikes", delay=delay),
        metrics=[metrics.MAE()],
        report=Report(period="1d"),
    )


job = bikes()


def downloaded() -> Job:
    """The job over the file that river fetches and keeps in your home directory (13 MB, once)."""
    readings = datasets.Bikes()
    if not readings.is_downloaded:
        readings.download(verbose=False)
    return bikes(path=str(readings.path))


def flow() -> Dataflow:
    """For `python -m bytewax.run examples.bikes.job:flow`."""
    return dataflow(job)
