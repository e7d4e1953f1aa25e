"""The jobs of examples/ on small inputs: run by the command, by Bytewax itself, and played."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dataflows import Metrics
from dataflows.runtime import load_job
from examples.payments import job as payments
from examples.payments.simulate import write
from tests.scenarios import running


def payments_input(directory: Path) -> int:
    """A few payments where the job looks for them; how many."""
    events, _ = write(directory / payments.DATA, days=12, customers=40, terminals=20)
    return len(events.read_bytes().splitlines())


def bikes_input(directory: Path) -> int:
    """Three days of two stations."""
    rng, moment, rows = random.Random(1), datetime(2016, 4, 1, tzinfo=UTC), 600
    fields = ["moment", "bikes", "station", "clouds", "humidity", "pressure", "temperature", "wind"]
    with gzip.open(directory / "toulouse_bikes.csv.gz", "wt", newline="") as file:
        table = csv.writer(file)
        table.writerow(fields)
        for _ in range(rows):
            moment += timedelta(seconds=rng.randint(60, 600))
            weather = [rng.randint(0, 100), rng.randint(30, 99), 1017.0, rng.uniform(5, 25), rng.uniform(0, 9)]
            table.writerow(
                [f"{moment:%Y-%m-%d %H:%M:%S}", rng.randint(0, 20), rng.choice(["pomme", "carmes"]), *weather]
            )
    return rows


def fraud_input(directory: Path) -> int:
    """Twenty days of three customers."""
    rng, rows, time_ms = random.Random(1), 800, 1_522_540_800_000
    with gzip.open(directory / "transactions.jsonl.gz", "wt") as file:
        for number in range(rows):
            time_ms += rng.randint(0, 4_000_000)
            row = {"tx_id": number, "ts": time_ms, "customer": rng.randint(1, 3), "terminal": rng.randint(1, 4)}
            file.write(json.dumps(row | {"amount": rng.randint(1, 9_999) / 100, "fraud": rng.randint(0, 1)}) + "\n")
    return rows


def call(arguments: Sequence[str], directory: Path) -> str:
    """Run `python -m …` in a directory, as one would at the root of the repository."""
    environment = running.environment(PYTHONHASHSEED="0")
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "make_input"), [("payments", payments_input), ("bikes", bikes_input), ("fraud", fraud_input)]
)
def test_the_command_and_bytewax_itself_write_the_same_records(
    name: str, make_input: Callable[[Path], int], tmp_path: Path
) -> None:
    """`millrace run` and `python -m bytewax.run` answer every event of an example, with the same bytes."""
    events = make_input(tmp_path)
    call(["dataflows", "run", f"examples.{name}.job", "--directory", "run"], tmp_path)
    call(["bytewax.run", f"examples.{name}.job:flow"], tmp_path)
    assert len(running.records(tmp_path / "run", "predictions")) == events
    for kind in ("predictions", "outcomes", "metrics"):
        theirs = (tmp_path / "runs" / name / f"{kind}.jsonl").read_bytes()
        assert (tmp_path / "run" / f"{kind}.jsonl").read_bytes() == theirs, kind


def test_fresh_runs_keep_the_simulated_payments(tmp_path: Path) -> None:
    """--fresh throws away what runs wrote, not the payments made before, and a second run says the same."""
    payments_input(tmp_path)
    files = sorted((tmp_path / payments.DATA).iterdir())
    before = [(file.name, file.stat().st_mtime_ns) for file in files]
    written = []
    for _ in range(2):
        printed = call(["dataflows", "run", "examples.payments.job", "--fresh"], tmp_path)
        written.append((tmp_path / "runs" / "payments" / "predictions.jsonl").read_bytes())
        assert "ROCAUC" in printed
        assert "records in runs/payments" in printed
    assert written[0] == written[1]
    assert before == [(file.name, file.stat().st_mtime_ns) for file in files]


def test_the_payments_job_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played over all it simulates, the last 10,000 outcomes are ranked far better than the first."""
    monkeypatch.chdir(tmp_path)
    reports = [record for record in payments.job().play() if isinstance(record, Metrics)]
    rolling = "ROCAUC_rolling_10000"
    early: Any = next(r.values[rolling] for r in reports if r.outcomes > 5_000)
    late: Any = reports[-1].values[rolling]
    assert early < 0.6
    assert late > 0.85
    assert reports[-1].values["ROCAUC"] > 0.8  # type: ignore[operator]


def test_bikes_are_read_from_where_river_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/bikes/job.py:downloaded` reads the file that river.datasets fetched, and fetches it only once."""

    class Bikes:
        is_downloaded = False
        path = tmp_path / "toulouse_bikes.csv"

        def download(self, verbose: bool) -> None:
            self.path.write_text("moment,bikes\n")
            Bikes.is_downloaded = True

    monkeypatch.setattr("river.datasets.Bikes", Bikes)
    for _ in range(2):
        job = load_job("examples.bikes.job:downloaded")
        assert job.events.names() == ["toulouse_bikes.csv"]
