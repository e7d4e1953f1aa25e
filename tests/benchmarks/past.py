"""What looking into the past costs: state at a checkpoint, replays, audits, and the room that history takes.

    PYTHONHASHSEED=0 python -m tests.benchmarks --only past
    PYTHONHASHSEED=0 python -m tests.benchmarks --only past --events 1000000   so many transactions

How to read it
--------------

*state --at* opens a checkpoint in this process and reads the features of one customer, each time anew: without the
start of an interpreter, with everything that the command does. *Replay* is `millrace replay` of a whole run against
`millrace run` of the same input, each a process of its own, starts included, pair by pair. An *audit* finds one
prediction, drawn at random, makes it again from its keyframe and compares; the learn log is opened anew each time.
The logistic regression is the fraud job's; the forest has 10 trees and sees fewer transactions. *Sizes* are of files
after the run, with the default retention.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from dataflows.audit import Auditor
from dataflows.checkpoints import Checkpoints
from dataflows.hashing import HASH_SEED
from dataflows.history import open_state
from dataflows.job import Job
from dataflows.runtime import load_job
from dataflows.settings import RunDirectory
from tests.benchmarks.measure import ROOT, BenchmarkError
from tests.benchmarks.plan import Plan, Result
from tests.benchmarks.transactions import write_synthetic

FRAUD = ROOT / "examples" / "fraud" / "job.py"
FOREST = ROOT / "tests" / "benchmarks" / "forest_job.py"

CUSTOMERS, TERMINALS = 100_000, 10_000
FOREST_EVENTS = 12_000
ASKED = 20
"""How often each question is asked."""

STATE_MAX_S, REPLAY_MIN, AUDIT_MAX_S, FOREST_MAX_S = 0.1, 1.0, 1.0, 10.0
"""The goals."""


def past(plan: Plan) -> Result:
    """Everything that is measured of the past."""
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        raise BenchmarkError(f"audits hash as workers do. Hint: PYTHONHASHSEED={HASH_SEED} python -m tests.benchmarks")
    events = plan.events if plan.events != 100_000 else 300_000
    source = write_synthetic(plan.scratch / "past.jsonl", events, CUSTOMERS, TERMINALS)
    pairs = [_pair(plan.scratch, source, number) for number in range(plan.pairs)]
    run = RunDirectory(plan.scratch / "past-0")
    job = load_job(str(FRAUD))
    state = _times(lambda rng: _features(job, run, rng))
    audit = _times(lambda rng: _audit(job, run, rng.randrange(events)))
    forest = _forest(plan)
    record = {
        "events": events,
        "state_s": state,
        "replay_ratios": [live / again for live, again in pairs],
        "audit_s": audit,
        "audit_forest_s": forest,
        "bytes": _sizes(run),
    }
    return record, [_table(record), _size_table(record)]


def _command(name: str, job: Path, source: Path, directory: Path, *options: str | Path) -> float:
    """Seconds that a command takes."""
    command = [sys.executable, "-m", "dataflows", name, job, "--data", source, "--directory", directory, *options]
    started = time.perf_counter()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
    return time.perf_counter() - started


def _pair(scratch: Path, source: Path, number: int) -> tuple[float, float]:
    """A run, and its replay: seconds."""
    directory = scratch / f"past-{number}"
    live = _command("run", FRAUD, source, directory, "--checkpoint", "5")
    return live, _command("replay", FRAUD, source, directory, "--output", scratch / f"again-{number}")


def _times(ask: Callable[[random.Random], None]) -> list[float]:
    rng = random.Random(1)
    found = []
    for _ in range(ASKED):
        started = time.perf_counter()
        ask(rng)
        found.append(time.perf_counter() - started)
    return found


def _features(job: Job, run: RunDirectory, rng: random.Random) -> None:
    manifests = Checkpoints(run).all()
    with closing(open_state(job, run, str(rng.choice(manifests).version))) as state:
        if not state.features(customer=rng.randrange(CUSTOMERS)):
            raise BenchmarkError("no features came")


def _audit(job: Job, run: RunDirectory, id: int) -> None:
    with closing(Auditor(job, run)) as auditor:
        if not auditor.remake(id).equal:
            raise BenchmarkError(f"prediction {id} was not made again")


def _forest(plan: Plan) -> list[float]:
    # Every n-th of the same span: labels come a week later, and many keyframes have to be passed.
    events = FOREST_EVENTS // 3 if plan.quick else FOREST_EVENTS
    source = write_synthetic(plan.scratch / "forest.jsonl", events, 1_000, 500)
    run = RunDirectory(plan.scratch / "forest")
    _command("run", FOREST, source, run.path)
    job = load_job(str(FOREST))
    return _times(lambda rng: _audit(job, run, rng.randrange(events)))


def _sizes(run: RunDirectory) -> dict[str, int]:
    """Bytes by what they are for."""
    places = {"state": run.groups, "learn log": run.learned, "order log": run.order_log(1).parent}
    found = {name: sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) for name, place in places.items()}
    return found | {"outputs": sum(file.stat().st_size for file in run.path.glob("*.jsonl"))}


def _table(record: dict[str, Any]) -> Table:
    table = Table("the past", "median", "largest", "goal", "", title=f"{record['events']:,} transactions")
    for name, seconds, most in (
        ("state --at a checkpoint, one customer", record["state_s"], STATE_MAX_S),
        ("audit of one prediction, logistic regression", record["audit_s"], AUDIT_MAX_S),
        ("audit of one prediction, forest of 10", record["audit_forest_s"], FOREST_MAX_S),
    ):
        middle = median(seconds)
        table.add_row(name, f"{middle:.3f} s", f"{max(seconds):.3f} s", f"under {most:g} s", _goal(middle < most))
    ratios = record["replay_ratios"]
    middle = median(ratios)
    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
    table.add_row("replay speed / live speed", f"{middle:.2f}", f"each {each}", "1.0", _goal(middle >= REPLAY_MIN))
    return table


def _size_table(record: dict[str, Any]) -> Table:
    table = Table("what history takes", "MB", "MB per million events")
    for name, size in record["bytes"].items():
        table.add_row(name, f"{size / 1e6:,.1f}", f"{size / record['events']:,.0f}")
    return table


def _goal(met: bool) -> str:
    return "met" if met else "missed"
