"""A job file that tests change, its events, its run, and the commands on it; for tests of datasets and models."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dataflows.checkpoints import Checkpoints
from dataflows.job import Job
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from tests.scenarios import running
from tests.scenarios.test_keystone import kill_all

JOB = """
from river import anomaly, dummy, facto, linear_model, metrics, preprocessing, tree
from dataflows import DISCARD, Event, Job, Jsonl, Label, Outputs, Time
from dataflows.job import Audit
from features import Count, Derived, Entity, Fields, Mean, Sum


class Payment(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    count: int | None = None
    kind: str = "food"
    good: bool = True
    y: int = 0
    fraud: bool | None = None


class Verdict(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    fraud: bool


CARD = Entity("card", [Count(), Mean("amount")], over="1h")
SHOP = Entity("shop", [Mean("fraud")], over="1d", of="labels")

job = Job(
    name="learning",
    events=Jsonl("EVENTS", Payment),
    features=[Fields("amount"), CARD, SHOP],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="fraud", delay="10m"),
    metrics=[metrics.ROCAUC()],
    audit=Audit(every=100),
)
"""
MODEL = "preprocessing.StandardScaler() | linear_model.LogisticRegression()"
LABEL = 'Label(field="fraud", delay="10m")'
FIELDS = 'Fields("amount")'
PER_SHOP = ("audit=Audit(every=100)", 'per="shop", audit=Audit(every=20)')
ARRIVAL = ("    audit=", '    time=Time(order="arrival", lateness="5m"),\n    audit=')
HOW = ("--groups", "4", "--batch-size", "25", "--checkpoint", "0", "--keep-last", "1000")


def payments(begin: int, end: int) -> list[dict[str, Any]]:
    """Payments; the same for the same numbers."""
    return [
        {
            "id": i,
            "t": 1000 + i * 10,
            "card": f"c{i * 31 % 17}",
            "shop": f"s{i * 17 % 4}",
            "amount": (i * 7919 % 1999) / 20 + 0.1,
            "count": None if i % 5 == 0 else i % 3,
            "kind": ("food", "fuel", "travel")[i % 3],
            "good": i % 4 == 1,
            "y": i % 7,
            "fraud": i * 7919 % 1999 > 1500 or i % 11 == 3,
        }
        for i in range(begin, end)
    ]


class Place:
    """A job file, its events, and a run."""

    def __init__(self, path: Path, *changes: tuple[str, str], events: int = 400) -> None:
        path.mkdir(exist_ok=True, parents=True)
        self.path = path
        self.file = path / "learning_job.py"
        self.out = path / "out"
        self.events = path / "events.jsonl"
        self.declare(*changes)
        self.feed(payments(0, events))

    def declare(self, *changes: tuple[str, str]) -> None:
        """Write the job file, with something in it replaced."""
        text = JOB
        for old, new in (*changes, ("EVENTS", str(self.events))):
            assert old in text, old
            text = text.replace(old, new)
        self.file.write_text(text)

    def feed(self, rows: list[dict[str, Any]]) -> None:
        """Append events to the input."""
        with self.events.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def run(self, *options: str) -> str:
        """`millrace run` to the end of the input."""
        return running.run(str(self.file), self.out, *HOW, *options)

    def refused(self, *options: str) -> str:
        """What a run says that must be refused."""
        process = running.start(str(self.file), self.out, *HOW, *options)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1, printed
        assert "Traceback" not in printed, printed
        return " ".join(printed.split())

    def kill(self, after: int, *options: str) -> None:
        """`millrace run --follow` until there are more predictions than that; then kill -9 of all its processes."""
        process = running.start(str(self.file), self.out, *HOW, "--follow", *options)
        file, deadline = self.out / "predictions.jsonl", time.monotonic() + 30
        while (not file.exists() or file.read_bytes().count(b"\n") <= after) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        kill_all(process.pid)
        process.communicate()

    def middle(self) -> str:
        """A checkpoint with questions open."""
        found = [m for m in Checkpoints(RunDirectory(self.out)).all() if m.open]
        return str(found[len(found) // 2].version)

    def job(self) -> Job:
        """The job as it is declared now."""
        return load_job(str(self.file))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind."""
        return running.records(self.out, kind)

    def command(self, name: str, *options: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command on the job and its run; what it printed has no line breaks of tables."""
        return command(name, str(self.file), *options, "--directory", str(out or self.out))


def command(*words: str, cwd: Path = running.ROOT) -> subprocess.CompletedProcess[str]:
    """`millrace` with these words, in a process of its own; fails the test at a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "dataflows", *words], env=running.environment(COLUMNS="200"), cwd=cwd,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Made(dict[str, Any]):
    """What is made when it is first asked for, by name."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make(name)
        return self[name]


def some(names: Iterable[str], *always: str) -> list[Any]:
    """Parameters of which most are run by `make thorough` only."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.thorough) for name in names]
