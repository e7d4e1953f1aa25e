"""Watches a run through the memory it shares with its launcher: when which batch was published, what it was at.

Nothing of the run is changed or asked: every few milliseconds the map in `state/control` is read. Memory and processor
time come from /proc.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dataflows.control import Control, Phase
from tests.benchmarks.measure import ROOT, BenchmarkError

POLL_S = 0.002
BATCH = 1_000
"""Events in a batch; an input file always fills them."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Timeline:
    """What was seen, in seconds of the monotonic clock: batches as they were published, and phases as they began."""

    times: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    workers: list[tuple[float, Phase]] = field(default_factory=list)
    launcher: list[tuple[float, Phase]] = field(default_factory=list)

    def batch_at(self, moment: float) -> int:
        """The newest batch that was published by a moment."""
        place = bisect_right(self.times, moment) - 1
        return self.batches[max(place, 0)]

    def time_of(self, batch: int) -> float:
        """When a batch was published, or the first one after it."""
        return self.times[min(bisect_left(self.batches, batch), len(self.times) - 1)]

    def rate(self, first: int, last: int) -> float:
        """Events/s from one batch to another."""
        return (last - first) * BATCH / (self.time_of(last) - self.time_of(first))

    def began(self, phase: Phase, who: str = "workers") -> list[float]:
        """When a phase began, each time."""
        return [moment for moment, seen in getattr(self, who) if seen == phase]

    def lasted(self, phase: Phase, who: str = "workers") -> list[float]:
        """How long a phase lasted, each time."""
        seen = getattr(self, who)
        return [after - moment for (moment, now), (after, _) in pairwise(seen) if now == phase]

    def whole_periods(self, after: int, until: int) -> tuple[int, int] | None:
        """The batches of the first and the last checkpoint between two batches; None when there are not two.

        Between them lie whole periods, so that it does not matter when the measurement began.
        """
        marks = [batch for moment in self.began(Phase.SNAPSHOT) if after <= (batch := self.batch_at(moment)) <= until]
        return (marks[0], marks[-1]) if len(marks) > 1 and marks[-1] > marks[0] else None

    def silences(self) -> list[float]:
        """For each checkpoint: seconds without a batch published, the longest such time from its begin to its end."""
        longest = []
        for (began, phase), (_, _), (end, _) in zip(self.workers, self.workers[1:], self.workers[2:], strict=False):
            first, last = bisect_right(self.times, began) - 1, bisect_right(self.times, end) + 1
            if phase == Phase.SNAPSHOT and first >= 0 and last <= len(self.times):
                longest.append(max(after - before for before, after in pairwise(self.times[first:last])))
        return longest


class Watched:
    """A program that runs and is watched; it and its workers are killed at the end, if not before."""

    def __init__(self, command: Sequence[str | Path], control: Path, log: Path, **environment: str) -> None:
        control.unlink(missing_ok=True)
        self._control = Control(control)  # made here, so that what a run before left is not taken for this one's
        self._log = log
        self._name = " ".join(map(str, command[:2]))
        self.timeline = Timeline()
        self.started = time.monotonic()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=kept | environment,
            )  # fmt: skip

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def until(self, condition: Callable[[Timeline], bool], limit_s: float) -> bool:
        """Watch until a condition holds, or for a time; whether it holds. Raises when the program fails."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            ended = self.process.poll()
            self._look()
            if condition(self.timeline):
                return True
            if ended is not None:
                if ended:
                    raise BenchmarkError(f"{self._name} ended with {ended}: {self._last_words()}")
                return False
            time.sleep(POLL_S)
        return False

    def for_seconds(self, seconds: float) -> None:
        """Watch for a time."""
        self.until(lambda _: False, seconds)

    def batches(self, number: int, limit_s: float) -> None:
        """Watch until a batch was published. Raises when it is not in time."""
        if not self.until(lambda seen: bool(seen.batches) and seen.batches[-1] >= number, limit_s):
            reached = self.timeline.batches[-1] if self.timeline.batches else 0
            raise BenchmarkError(f"batch {number} was not reached in {limit_s:.0f} s, only {reached}")

    def _look(self) -> None:
        now, seen, control = time.monotonic(), self.timeline, self._control
        published = control.published
        if published > (seen.batches[-1] if seen.batches else 0):
            seen.times.append(now)
            seen.batches.append(published)
        for phases, phase in ((seen.workers, control.workers), (seen.launcher, control.launcher)):
            if not phases or phases[-1][1] != phase:
                phases.append((now, phase))

    def workers(self) -> list[int]:
        """The workers' process ids; its own where it starts none."""
        return _children(self.process.pid) or [self.process.pid]

    def peak_mib(self) -> dict[str, float | None]:
        """Peak memory of the workers together, and of the launcher."""
        workers = [_peak_mib(pid) for pid in self.workers()]
        known = [each for each in workers if each is not None]
        return {"workers": sum(known) if known else None, "launcher": _peak_mib(self.process.pid)}

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far of the workers together, and of the launcher."""
        workers = self.workers()
        own = _cpu_s(self.process.pid) if self.process.pid not in workers else 0.0
        return {"workers": sum(map(_cpu_s, workers)), "launcher": own}

    def stop(self, limit_s: float = 600) -> None:
        """Have it stop with a last checkpoint."""
        self.process.send_signal(signal.SIGTERM)
        self.until(lambda _: False, limit_s)
        if self.process.poll() != 0:
            raise BenchmarkError(f"it did not stop well: {self._last_words()}")

    def kill(self) -> None:
        """kill -9, the workers too, and wait until all are gone."""
        if self.process.poll() is None:
            workers = _children(self.process.pid)
            for pid in (self.process.pid, *workers):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            while any(_alive(pid) for pid in workers):
                time.sleep(POLL_S)
        self.process.wait()

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-8:])


def _children(pid: int) -> list[int]:
    known = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
    return [each for each in known if (fields := _stat(each)) and int(fields[1]) == pid and fields[0] != "Z"]


def _alive(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent …; none when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) * _TICK_S if fields else 0.0


def _peak_mib(pid: int) -> float | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM")), None)


def size(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


def percentile(values: Sequence[float], part: float) -> float | None:
    """The value that a part of all do not exceed; None of none.

    >>> percentile([3.0, 1.0, 2.0], 0.99), percentile(range(1, 1001), 0.99)
    (3.0, 990)
    """
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part + 0.999999), len(ordered)) - 1] if ordered else None


def manifest_fields(manifests: Sequence[Any]) -> dict[str, list[float]]:
    """What manifests say, one after the other: bytes written, events since the one before, stall (s)."""
    pairs = list(pairwise(manifests))
    return {
        "bytes": [new.bytes for _, new in pairs],
        "events": [new.questions - old.questions for old, new in pairs],
        "stall": [new.stall for _, new in pairs if new.stall],
    }
