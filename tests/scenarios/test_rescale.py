"""The number of processes changes in mid-stream: nothing else does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.killer import Killer
from tests.chaos.runs import Run, until, what_is_committed
from tests.chaos.trial import Plan, Trial

PROCESSES = (1, 3, 2, 1)
PLANS = [
    Plan("fraud", "event_time", PROCESSES, fed=True, events=1600, flush=16, checkpoint=0.1),
    Plan("shops", "arrival", PROCESSES, fed=True, stopped=True, events=1000, flush=16, checkpoint=0.1),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.job)
def test_a_job_goes_on_in_three_processes_in_two_and_in_one(plan: Plan, tmp_path: Path) -> None:
    """Stopped, killed and stopped in between, outputs and state are those of an undisturbed run of one process."""
    trial = Trial(plan, tmp_path / "trial", tmp_path / "undisturbed", Killer(random.Random(1)))
    quarter = len(trial.inputs.lines) // 4
    asked = []
    for end in (stop, kill, stop):
        trial.inputs.feed(quarter, cut=0.5)
        run = trial.start(follow=True)
        try:
            end(trial, run)
        finally:
            run.clean_up()
        asked.append(questions(trial))
    trial.finish()
    asked.append(questions(trial))
    assert asked == sorted(set(asked)), "each number of processes has worked on a part"
    assert list(trial.differences()) == []


def stop(trial: Trial, run: Run) -> None:
    """Once it has read what there is."""
    trial.stop_when_read(run)


def kill(trial: Trial, run: Run) -> None:
    """All processes, once some more is committed."""
    before = questions(trial)
    until(lambda: run.code is not None or questions(trial) > before, "nothing is committed")
    run.kill([run.launcher, *run.workers()])
    run.wait()


def questions(trial: Trial) -> int:
    """How many events were asked about, by what the engine has committed."""
    found = what_is_committed(trial.plan.reference, trial.out)
    return 0 if found is None or found.reader is None else int(found.reader["questions"])
