"""The jobs whose figures river itself gives: bikes, phishing, network attacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from river import anomaly, compose, feature_extraction, linear_model, metrics, optim, preprocessing, stats

from dataflows import Csv, Event, Job, Jsonl, Label
from examples.bikes.job import Reading, bikes
from features import Fields

bikes_now = partial(bikes, delay=0)
bikes_late = partial(bikes, delay="30m")


def with_hour(x: dict[str, Any]) -> dict[str, Any]:
    """Add the hour of the reading."""
    return {**x, "hour": x["moment"].hour}


def whole_pipeline(delay: Any) -> Job:
    """river's tutorial with everything inside the model: it transforms again when it learns."""
    weather: Any = compose.Select("clouds", "humidity", "pressure", "temperature", "wind")
    by_hour = compose.FuncTransformer(with_hour) | feature_extraction.TargetAgg(
        by=["station", "hour"], how=stats.Mean()
    )
    model: Any = weather + by_hour
    model |= preprocessing.StandardScaler()
    model |= linear_model.LinearRegression(optimizer=optim.SGD(0.001))
    return Job(
        name="bikes-whole",
        events=Csv("toulouse_bikes.csv.gz", Reading),
        features=[Fields("moment", "station", "clouds", "humidity", "pressure", "temperature", "wind")],
        model=model,
        label=Label(field="bikes", delay=delay),
        metrics=[metrics.MAE()],
    )


whole_now = partial(whole_pipeline, 0)
whole_late = partial(whole_pipeline, "30m")

PHISHING_FIELDS = (
    "empty_server_form_handler",
    "popup_window",
    "https",
    "request_from_other_domain",
    "anchor_from_other_domain",
    "is_popular",
    "long_url",
    "age_of_domain",
    "ip_in_url",
)


class Site(Event, time="i", unit="us"):
    i: int
    empty_server_form_handler: float
    popup_window: float
    https: float
    request_from_other_domain: float
    anchor_from_other_domain: float
    is_popular: float
    long_url: float
    age_of_domain: int
    ip_in_url: int
    phishing: bool


def phishing(delay: int) -> Job:
    """Phishing with labels delayed by so many samples."""
    return Job(
        name="phishing",
        events=Jsonl("phishing.jsonl", Site),
        features=[Fields(*PHISHING_FIELDS)],
        model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
        label=Label(field="phishing", delay=delay),
        metrics=[metrics.ROCAUC()],
    )


phishing_0 = partial(phishing, 0)
phishing_10 = partial(phishing, 10)
phishing_100 = partial(phishing, 100)


class Connection(Event, time="i", unit="us"):
    i: int
    duration: float
    src_bytes: float
    dst_bytes: float
    service: int


def attacks() -> Job:
    """Network attacks by an anomaly detector, scored at once."""
    return Job(
        name="attacks",
        events=Csv("kdd99_http.csv", Connection),
        features=[Fields("duration", "src_bytes", "dst_bytes")],
        model=preprocessing.MinMaxScaler() | anomaly.HalfSpaceTrees(seed=42),
        label=Label(field="service", delay=0),
        metrics=[metrics.ROCAUC()],
    )
