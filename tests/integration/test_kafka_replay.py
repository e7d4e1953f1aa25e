"""The past of jobs on Kafka: replays from the offsets of the order log, and a new job that takes over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dataflows.checkpoints import Checkpoints
from dataflows.settings import RunDirectory
from tests.integration import jobs
from tests.integration.test_kafka import JOB, Stage
from tests.integration.topics import Topics
from tests.scenarios import running


def millrace(stage: Stage, *words: str) -> str:
    """A command in a process of its own, with the stage's topics; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dataflows", *words], env=running.environment(**stage.environment), cwd=running.ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In an order that partitions do not change."""
    return sorted(rows, key=lambda row: row["id"])


def test_a_replay_reads_the_offsets_again(kafka: Topics, tmp_path: Path) -> None:
    """From the start and from a checkpoint, in order of arrival: what the topics got, in files; nothing is sent."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    rows = jobs.payments(1500)
    told = jobs.chargebacks(rows)
    for begin, end in ((0, 800), (800, 1500)):
        kafka.fill(stage.payments, rows[begin:end], key="card")
        kafka.fill(stage.chargebacks, [row for row in told if begin <= row["id"] < end], key="id")
        stage.run("--keep-last", "100")
    first = min(m.version for m in Checkpoints(RunDirectory(stage.out)).all())
    sent = {"predictions": by_id(kafka.values(stage.scores)), "outcomes": by_id(kafka.values(stage.outcomes))}
    here = ("--directory", str(stage.out))
    millrace(stage, "replay", f"{JOB}:on_kafka", *here, "--output", str(tmp_path / "all"))
    millrace(stage, "replay", f"{JOB}:on_kafka", *here, "--output", str(tmp_path / "half"), "--from", str(first))
    for kind, expected in sent.items():
        assert by_id(running.records(tmp_path / "all", kind)) == expected
    half = running.records(tmp_path / "half", "predictions")
    assert 0 < len(half) < 1500
    assert [row for row in sent["predictions"] if row["id"] in {row["id"] for row in half}] == by_id(half)
    assert len(kafka.values(stage.scores)) == 1500
    assert "all is as it was" in millrace(stage, "audit", f"{JOB}:on_kafka", "--all", *here)


def test_a_new_job_takes_over_from_its_offsets(kafka: Topics, tmp_path: Path) -> None:
    """Bootstrapped over history, the next run goes on behind it: all as a run over everything, each record once."""
    stage = Stage(kafka, tmp_path, ORDER="arrival")
    rows = jobs.payments(1200)
    told = jobs.chargebacks(rows)
    kafka.fill(stage.payments, rows[:700], key="card")
    kafka.fill(stage.chargebacks, [row for row in told if row["id"] < 700], key="id")
    stage.run("--until", "end", job="on_kafka")
    job, new = f"{JOB}:from_kafka", tmp_path / "new"
    millrace(stage, "bootstrap", job, "--from-run", str(stage.out), "--directory", str(new))
    kafka.fill(stage.payments, rows[700:], key="card")
    kafka.fill(stage.chargebacks, [row for row in told if row["id"] >= 700], key="id")
    running.run(job, new, "--until", "end", **stage.environment)
    parts = [path.read_bytes() for path in new.glob("history/*/predictions.jsonl")]
    history = [json.loads(line) for line in b"".join(parts).splitlines()]
    live = running.records(new, "predictions")
    assert {row["id"] for row in history} == set(range(700))
    assert {row["id"] for row in live} == set(range(700, 1200))
    assert len(history) + len(live) == 1200
    assert by_id(history) == by_id(kafka.values(stage.scores))
    assert live[-1]["version"] > history[-1]["version"] > 0
