"""Kills at chosen moments: watches what a run says it is at, and strikes somewhere within the wanted phase."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple

from dataflows.control import Control, Phase
from tests.chaos.runs import Fault, Run

PHASES = ("running", "snapshot", "committing", "manifest", "prune", "start")
VICTIMS = ("launcher", "worker", "all")

_POLL = 0.0001
_IDLE = 1.5
"""Seconds without anything published, all input fed, after which nothing more is to be expected."""


class Wanted(NamedTuple):
    """Whom to kill, and when: within which phase, after how many of them."""

    phase: str
    victim: str
    skip: int = 0


class Hit(NamedTuple):
    """A kill that was done: how long the phase had lasted."""

    phase: str
    victim: str
    after: float


class Killer:
    """Strikes, and learns how long phases last, so that strikes spread over the whole of them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.durations: dict[str, list[float]] = {
            "running": [0.1], "snapshot": [0.02], "committing": [0.004], "manifest": [0.004], "prune": [0.01],
            "start": [0.05],
        }  # fmt: skip
        """By phase, how long it lasted where nobody was killed; the first is a guess."""

    def strike(self, run: Run, wanted: Wanted, feed: Callable[[], bool] = lambda: False) -> Hit | None:
        """Kill within the phase; None if the run ended, or ran out of input, before it came, or its start is over.

        `feed` is called all the time, and says whether there is more to come. Raises `Fault` when the run fails by
        itself, or hangs.
        """
        within = self._moment(wanted)
        skip, delay = wanted.skip, self._rng.random() * self.typical(wanted.phase)
        begun: float | None = None
        watch = _Watch(run)
        while run.code is None:
            now = time.monotonic()
            if not feed() and watch.idle(now):
                return None
            control = run.control
            if control is None or not within(control):
                if begun is not None:  # it is over: the next one, or strike earlier
                    self.durations[wanted.phase].append(now - begun)
                    if wanted.phase == "start":
                        return None
                    skip, delay = (skip - 1, delay) if skip > 0 else (0, delay / 2)
                begun = None
            else:
                begun = now if begun is None else begun
                pids = self._pids(run, wanted.victim) if skip <= 0 and now - begun >= delay else []
                if pids:
                    run.kill(pids)
                    return Hit(wanted.phase, wanted.victim, now - begun)
            time.sleep(_POLL)
        if run.code != 0:
            raise Fault(f"the run in {run.directory} ended with {run.code} before it was killed: {run.printed()}")
        return None

    def typical(self, phase: str) -> float:
        """The median of what was seen, in seconds."""
        seen = sorted(self.durations[phase])
        return seen[len(seen) // 2]

    def _moment(self, wanted: Wanted) -> Callable[[Control], bool]:
        # The launcher makes the state ready, then the reader opens it: a strike at the start is at one of the two.
        if wanted.phase == "start" and (wanted.victim == "worker" or self._rng.random() < 0.5):
            return lambda control: control.workers == Phase.START
        return _WITHIN[wanted.phase]

    def _pids(self, run: Run, victim: str) -> list[int]:
        workers = run.workers()
        if victim == "launcher":
            return [run.launcher]
        if victim == "worker":
            return [self._rng.choice(workers)] if workers else []
        return self._rng.sample([run.launcher, *workers], len(workers) + 1)


_WITHIN: dict[str, Callable[[Control], bool]] = {
    "running": lambda control: control.workers == Phase.RUNNING,
    "snapshot": lambda control: control.workers == Phase.SNAPSHOT,
    "committing": lambda control: control.workers == Phase.COMMITTING,
    "manifest": lambda control: control.launcher == Phase.MANIFEST,
    "prune": lambda control: control.launcher == Phase.PRUNE,
    "start": lambda control: control.launcher == Phase.START,
}


class _Watch:
    """Notices that a run gets on no more, and one that hangs."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begun = time.monotonic()
        self._published = -1
        self._since: float | None = None

    def idle(self, now: float) -> bool:
        """Whether nothing was published for a while, though there is nobody to wait for."""
        control = self._run.control
        if control is None or not self._run.has_begun:
            if now - self._begun > 60.0:
                raise Fault(f"the run in {self._run.directory} does not start: {self._run.printed()}")
            return False
        if control.published != self._published:
            self._published, self._since = control.published, now
        return self._since is not None and now - self._since > _IDLE
