"""Kills runs with -9 at chosen moments, lets them go on, and compares everything with runs that nothing happened to.

    make chaos                                    200 kills, about a quarter of an hour on 2 cores
    make chaos ARGS="--kills 60 --seed 7"         fewer, others
    python -m tests.chaos --keep                  leaves the directories of all trials

How to read it
--------------

A *trial* is one job with one input: it is killed up to eight times, goes on each time, and then runs to the end of its
input or is stopped with questions open. All that it wrote is compared byte for byte, and all that it holds to the last
bit, with an undisturbed run of the same batches in one process; and with one over the whole input, which knows nothing
of the killed run. Every checkpoint that was kept must open, and hold what a plain Python loop without engine and
checkpoints holds after the same batch.

A *phase* is what the run said it was at when it was killed: `running` (events go through), `snapshot` (steps write to
the state store), `committing` (the state store has the checkpoint, the engine has not), `manifest` and `prune` (of the
launcher), `start` (the launcher makes the state ready, or the reader opens it). A *victim* is the launcher, one worker,
or all of them.

*What the kills left behind* says of how many kills the next start had something to mend, and what.

Exit code 1 on any difference; the directories of that trial stay, and are named.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.killer import PHASES, VICTIMS, Killer, Wanted
from tests.chaos.runs import Fault
from tests.chaos.trial import Kill, Plan, Trial, plan_of
from tests.chaos.wreck import MEANINGS

KILLS_OF_A_TRIAL = 8
TRIALS_MAX = 4
"""Trials for each that would do if every kill came about: some do not, as the input is at its end before."""


def main() -> int:
    """The command line; the exit code."""
    options = _arguments()
    campaign = Campaign(options.kills, options.seed, options.keep, Path(tempfile.mkdtemp(prefix="millrace-chaos-")))
    campaign.run()
    return campaign.report()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kills runs and compares.")
    parser.add_argument("--kills", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is left to chance but the machine's timing")
    parser.add_argument("--keep", action="store_true", help="keep the directories of trials without a difference too")
    return parser.parse_args()


def deck(kills: int, rng: random.Random) -> deque[Wanted]:
    """What to strike, in random order: every phase as often as every other, and of each all victims.

    >>> cards = deck(36, random.Random(1))
    >>> sorted(Counter(card.phase for card in cards).values()), sorted(Counter(card.victim for card in cards).values())
    ([6, 6, 6, 6, 6, 6], [12, 12, 12])
    """
    cards = []
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        skip = 0 if phase == "start" else rng.randrange(4)
        cards.append(Wanted(phase, VICTIMS[number // len(PHASES) % len(VICTIMS)], skip))
    rng.shuffle(cards)
    return deque(cards)


class Campaign:
    """Many trials, and what came of them."""

    def __init__(self, kills: int, seed: int, keep: bool, directory: Path) -> None:
        self._seed = seed
        self._keep = keep
        self._directory = directory
        self._wanted = kills
        self._deck = deck(kills, random.Random(seed))
        self._killer = Killer(random.Random(seed))
        self._kills: list[tuple[Plan, Kill]] = []
        self._faults: list[str] = []
        self._trials = 0
        self._begun = time.monotonic()
        self._out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)

    def run(self) -> None:
        """Trials until all kills are done."""
        most = TRIALS_MAX * (self._wanted // KILLS_OF_A_TRIAL + 1)
        while self._deck and self._trials < most:
            plan = plan_of(self._trials, random.Random(f"{self._seed} {self._trials}"))
            self._trials += 1
            self._try(plan, self._directory / f"{self._trials:03d}")
        if self._deck:
            self._faults.append(f"{len(self._deck)} of {self._wanted} kills never came about in {self._trials} trials")

    def _try(self, plan: Plan, directory: Path) -> None:
        self._say(f"trial {self._trials}: {plan}")
        try:
            trial = Trial(plan, directory, self._directory / "undisturbed", self._killer)
            self._disturb(trial)
            trial.finish()
            differences = list(trial.differences())
        except Fault as fault:
            differences = [str(fault)]
        for text in differences:
            self._faults.append(f"trial {self._trials} ({plan}), in {directory}: {text}")
            self._out.print(f"DIFFERENCE in {directory}: {text}", style="red", markup=False, soft_wrap=True)
        if not differences and not self._keep:
            shutil.rmtree(directory)

    def _disturb(self, trial: Trial) -> None:
        dealt = [self._deck.popleft() for _ in range(min(KILLS_OF_A_TRIAL, len(self._deck)))]
        done = 0
        try:
            for kill in trial.disturb(dealt):
                done += 1
                self._kills.append((trial.plan, kill))
                self._say(f"  {len(self._kills)}/{self._wanted} {_in_words(kill)}")
        finally:
            self._deck.extend(dealt[done:])  # what did not come about is tried in another trial

    def _say(self, text: str) -> None:
        self._out.print(f"{time.monotonic() - self._begun:6.0f} s  {text}", markup=False, soft_wrap=True)

    # -- the end

    def report(self) -> int:
        """Print the tables; the exit code."""
        for table in (self._phase_table(), self._plan_table(), self._wreck_table()):
            self._out.print(table, "")
        seconds = time.monotonic() - self._begun
        self._out.print(f"{len(self._kills)} kills in {self._trials} trials, {seconds / 60:.1f} minutes")
        if self._faults:
            self._out.print(f"{len(self._faults)} differences; directories are in {self._directory}", style="red")
            for fault in self._faults:
                self._out.print(f"- {fault}", markup=False, soft_wrap=True)
            return 1
        self._out.print("no difference", style="green")
        if not self._keep:
            shutil.rmtree(self._directory)
        return 0

    def _phase_table(self) -> Table:
        table = Table("phase", *VICTIMS, "all kills", "lasts (median)", title="Kills by phase and victim")
        counts = Counter((kill.hit.phase, kill.hit.victim) for _, kill in self._kills)
        for phase in PHASES:
            row = [counts[phase, victim] for victim in VICTIMS]
            table.add_row(phase, *map(str, row), str(sum(row)), f"{self._killer.typical(phase) * 1000:.1f} ms")
        return _aligned(table)

    def _plan_table(self) -> Table:
        table = Table("of the kills", "", title="In which runs")
        for name, key in _KINDS.items():
            counts = Counter(key(plan, kill) for plan, kill in self._kills)
            table.add_row(name, ", ".join(f"{value} {counts[value]}" for value in sorted(counts)))
        return table

    def _wreck_table(self) -> Table:
        table = Table("left behind", "kills", "at most", title="What the kills left behind")
        wrecks = [kill.wreck for _, kill in self._kills if kill.wreck is not None]
        for name, meaning in MEANINGS.items():
            values = [value for wreck in wrecks if (value := getattr(wreck, name))]
            table.add_row(meaning, str(len(values)), f"{max(values, default=0):,}")
        table.add_row("(looked at)", str(len(wrecks)), "")
        return _aligned(table)


_KINDS: dict[str, Callable[[Plan, Kill], str]] = {
    "job": lambda plan, kill: plan.job,
    "order": lambda plan, kill: plan.order,
    "processes": lambda plan, kill: str(kill.processes),
    "input": lambda plan, kill: "fed" if plan.fed else "whole",
    "in the end": lambda plan, kill: "stopped" if plan.stopped else "end of input",
    "early flush after": lambda plan, kill: str(plan.flush),
    "checkpoints kept": lambda plan, kill: str(plan.kept),
    "entities in memory": lambda plan, kill: str(plan.cache),
    "after the kill": lambda plan, kill: "workers start again" if kill.wreck is None else "a new start",
}


def _in_words(kill: Kill) -> str:
    hit, wreck = kill.hit, kill.wreck
    text = f"{hit.victim} in {hit.phase} after {hit.after * 1000:.1f} ms, {kill.processes} processes"
    if wreck is None:
        return f"{text}; workers start again"
    left = [f"{name} {value:,}" for name, value in wreck._asdict().items() if value]
    return f"{text}; left: {', '.join(left) or 'nothing'}"


def _aligned(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


if __name__ == "__main__":
    sys.exit(main())
