"""Runs programs in processes of their own and measures them from outside: wall time, processor time, peak memory.

Keep this module's imports small: on Linux a child's peak memory is never less than what its parent held when it was
started, so the process that measures must be the smallest of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLAIN_LOOP = Path(__file__).with_name("plain_loop.py")
JOB = ROOT / "examples" / "fraud" / "job.py"
STATE_JOB = Path(__file__).with_name("state_job.py")
START_POLL_S = 0.002
POLL_S = 0.02
WORKER_COLLECTOR = (20_000, 50, 20)
"""Thresholds of the garbage collector that `dataflows.runtime.work` sets in its workers; keep the two the same."""


class BenchmarkError(RuntimeError):
    """A program that was to be measured failed, or did not do the work it was given."""


@dataclass(frozen=True)
class Ended:
    """What the kernel says of a process that ended, those it waited for included.

    `peak_mib` is that of the largest single process, not a sum.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float
    stdout: str


def run(command: Sequence[str | Path], watch: Callable[[], float] = lambda: POLL_S) -> Ended:
    """Run a command from the repository's root to its end.

    Parameters
    ----------
    command
        Program and arguments.
    watch
        Called again and again while it runs; returns the seconds until the next call.

    Raises `BenchmarkError` with the last lines of stderr when the exit code is not 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen([str(each) for each in command], cwd=ROOT, stdout=out, stderr=err)
        try:
            status, usage = _await_end(process.pid, watch)
        except BaseException:
            process.terminate()  # the launcher passes a stop on to its workers
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        if process.returncode != 0:
            raise BenchmarkError(f"{command[1:4]} ended with {process.returncode}: {_tail(err)}")
        out.seek(0)
        return Ended(wall_s, usage.ru_utime + usage.ru_stime, _mib(usage.ru_maxrss), out.read().decode())


def _await_end(pid: int, watch: Callable[[], float]) -> tuple[int, resource.struct_rusage]:
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage
        time.sleep(watch())


def _tail(file: Any) -> str:
    file.seek(0)
    return "\n".join(file.read().decode(errors="replace").strip().splitlines()[-8:])


def _mib(maxrss: int) -> float:
    """The kernel counts in KiB, macOS in bytes."""
    return round(maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


# -- the hand-written loop


@dataclass(frozen=True)
class PlainRun:
    """One run of the hand-written loop; `processing_s` is by its own clock, without the interpreter's start."""

    events: int
    processing_s: float
    whole_s: float
    cpu_s: float
    peak_mib: float
    rocauc: float


_WITH_COLLECTOR = f"""
import gc, runpy, sys
gc.set_threshold(*{WORKER_COLLECTOR})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_plain(source: Path, scratch: Path, worker_collector: bool = False) -> PlainRun:
    """The hand-written loop in a process of its own; with the interpreter's collector settings, or the workers'."""
    program: list[str | Path] = ["-c", _WITH_COLLECTOR, PLAIN_LOOP] if worker_collector else [PLAIN_LOOP]
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        ended = run([sys.executable, *program, source, directory])
    said = json.loads(ended.stdout.splitlines()[0])
    return PlainRun(said["events"], said["seconds"], ended.wall_s, ended.cpu_s, ended.peak_mib, said["rocauc"])


def run_river(source: Path, scratch: Path) -> tuple[float, float]:
    """Events/s of the hand-written loop and of river's own tools, one after the other in one process."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        ended = run([sys.executable, PLAIN_LOOP, source, directory, "--river"])
    plain, river = (json.loads(line) for line in ended.stdout.splitlines())
    return plain["events"] / plain["seconds"], river["events"] / river["seconds"]


# -- Millrace


@dataclass(frozen=True)
class FlowRun:
    """One `millrace run`, measured by what it leaves in its directory.

    Parameters
    ----------
    processing_s
        From the reader's opening of its input to the last record written: what the hand-written loop calls seconds.
    committed_s
        The same, to the last checkpoint's end.
    steady_events_per_s
        Between the first and the last batch published; None where one status is all there was.
    whole_s
        From the command to its end, with the start of two interpreters.
    checkpoints
        Completed ones, the last at the end of input included.
    """

    events: int
    processing_s: float
    committed_s: float
    steady_events_per_s: float | None
    whole_s: float
    cpu_s: float
    peak_mib: float
    rocauc: float
    checkpoints: int


class _Watch:
    """Notes when a run's reader opened its input and what the first published status said."""

    def __init__(self, directory: Path) -> None:
        self._output = directory / "predictions.jsonl"
        self._status = directory / "state" / "status.json"
        self.started: float | None = None
        self.first: tuple[float, int] | None = None

    def __call__(self) -> float:
        if self.started is None:
            if not self._output.exists():
                return START_POLL_S
            self.started = time.time()
        if self.first is None:
            self.first = self.published()
        return POLL_S

    def published(self) -> tuple[float, int] | None:
        """When the status on disk was written (wall clock, s), and how many questions it counts."""
        try:
            return self._status.stat().st_mtime, json.loads(self._status.read_bytes())["questions"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None


def run_flow(
    source: Path,
    scratch: Path,
    workers: int = 1,
    groups: int = 16,
    batch_size: int = 1_000,
    checkpoint_s: float = 10.0,
) -> FlowRun:
    """`millrace run` of the fraud job, from file to file, in a new directory."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        directory = Path(name)
        watch = _Watch(directory)
        command: list[str | Path] = [sys.executable, "-m", "dataflows", "run", JOB, "--data", source]
        command += ["--directory", directory, "--checkpoint", str(checkpoint_s), "--workers", str(workers)]
        command += ["--groups", str(groups), "--batch-size", str(batch_size)]
        ended = run(command, watch)
        return _flow_run(directory, watch, ended)


def _flow_run(directory: Path, watch: _Watch, ended: Ended) -> FlowRun:
    status = json.loads((directory / "state" / "status.json").read_bytes())
    last = watch.published()
    if not status["end"] or watch.started is None or last is None:
        raise BenchmarkError(f"the run ended before its input did: {status}")
    counts = status["counts"]
    if not status["questions"] == counts.get("predictions") == counts.get("outcomes"):
        raise BenchmarkError(f"not every question was answered and scored: {status}")
    return FlowRun(
        events=status["questions"],
        processing_s=_newest(directory, "*.jsonl") - watch.started,
        committed_s=_newest(directory / "state" / "recovery" / "1", "*.sqlite3") - watch.started,
        steady_events_per_s=_steady(watch.first, last),
        whole_s=ended.wall_s,
        cpu_s=ended.cpu_s,
        peak_mib=ended.peak_mib,
        rocauc=status["metrics"]["ROCAUC"],
        checkpoints=_checkpoints(directory / "state" / "recovery" / "1"),
    )


def _newest(directory: Path, pattern: str) -> float:
    return max(file.stat().st_mtime for file in directory.glob(pattern))


def _steady(first: tuple[float, int] | None, last: tuple[float, int]) -> float | None:
    """Events/s between two published statuses.

    >>> _steady((10.0, 1_000), (12.0, 21_000))
    10000.0
    """
    if first is None or last[0] <= first[0]:
        return None
    return (last[1] - first[1]) / (last[0] - first[0])


def _checkpoints(recovery: Path) -> int:
    """How often all workers committed: the engine counts epochs from 1, and keeps one row per commit's frontier."""
    frontiers: dict[int, int] = {}
    for file in recovery.glob("*.sqlite3"):
        with closing(sqlite3.connect(file)) as database:
            for worker, frontier in database.execute(
                "SELECT worker_index, MAX(worker_frontier) FROM fronts GROUP BY 1"
            ):
                frontiers[worker] = max(frontier, frontiers.get(worker, 0))
    return min(frontiers.values(), default=1) - 1


# -- the machine


def machine() -> dict[str, Any]:
    """Where the figures come from: processor, cores, interpreter, versions, and how busy it is."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {name: version(name) for name in ("bytewax", "river", "msgspec", "pydantic")},
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def fingerprint() -> str:
    """Changes when the code that is measured does, so that figures of two versions are not taken for one."""
    digest = hashlib.sha256()
    for package in ("features", "dataflows", "examples/fraud"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def plain_record(result: PlainRun | FlowRun) -> dict[str, Any]:
    """A result for the JSON file."""
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(result).items()}
