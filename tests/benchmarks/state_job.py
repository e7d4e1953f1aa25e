"""The job of the state benchmark: entities of about 1 KB of state each, and a small model.

The wide field `profile` comes with an entity's first event only, so that one event fills its state; later events are
narrow, as events are. 20 events of an entity fall into 7 days however many entities there are (`state_events`), so its
state stays at about 1 KB when the wide event has left the windows.
"""

from __future__ import annotations

import os
from pathlib import Path

from river import linear_model, preprocessing

from dataflows import Event, Job, Jsonl, Label, flow
from features import Count, Entity, Fields, Last, Mean, NUnique

FLUSH = "MILLRACE_BENCH_FLUSH"
"""Environment: after how many changes steps write rows before a checkpoint asks (`dataflows.flow.FLUSH`)."""


class Ping(Event, id="number", time="at", unit="us"):
    number: int
    at: int
    entity: int
    amount: float
    wait: int
    y: bool
    profile: str | None = None


entity = Entity("entity", [Count(), Mean("amount"), NUnique("profile")], over=[Last(20), "7d"])

job = Job(
    name="bench_state",
    events=Jsonl(Path("events.jsonl"), Ping),
    features=[Fields("amount"), entity],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="y", delay="wait"),
)

if FLUSH in os.environ:
    # Workers import this file before they build the flow: rows are then written at checkpoints only, or never.
    flow.FLUSH = flow.FLUSH_LIVE = flow.FLUSH_QUESTIONS = flow.FLUSH_QUESTIONS_LIVE = int(os.environ[FLUSH])
