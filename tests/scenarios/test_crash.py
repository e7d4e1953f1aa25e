"""A few crash tests of `make chaos`, and that they can fail: without what mends a crash, a difference appears."""

from __future__ import annotations

import pickle
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dataflows.recovery import resume_epoch
from dataflows.settings import RunDirectory
from tests.chaos.killer import PHASES, Killer, Wanted
from tests.chaos.runs import Fault, Run, has_read, until
from tests.chaos.trial import Plan, Trial

KILLS = [
    (
        Plan("fraud", "event_time", (1, 2), fed=True, flush=8, kept=2, cache=60, events=3000, rate=2500),
        [Wanted("start", "launcher"), Wanted("snapshot", "all", 1), Wanted("committing", "launcher", 1),
         Wanted("prune", "all", 3), Wanted("running", "worker", 1)],
    ),
    (
        Plan("shops", "arrival", (2, 1), fed=True, stopped=True, flush=64, events=2000, rate=3000),
        [Wanted("running", "all", 2), Wanted("committing", "worker", 1), Wanted("manifest", "launcher", 1),
         Wanted("start", "worker")],
    ),
]  # fmt: skip


def trial(plan: Plan, directory: Path, seed: int = 1) -> Trial:
    """A trial within a test's directory."""
    return Trial(plan, directory / "trial", directory / "undisturbed", Killer(random.Random(seed)))


@pytest.mark.parametrize(("plan", "wanted"), KILLS, ids=lambda value: value.job if isinstance(value, Plan) else "")
def test_a_run_that_is_killed_again_and_again_gives_what_an_undisturbed_one_gives(
    plan: Plan, wanted: list[Wanted], tmp_path: Path
) -> None:
    """Outputs byte for byte and all state to the last bit, for kills in every phase, both orders, 1 and 2 processes."""
    killed = trial(plan, tmp_path)
    hits = [kill.hit.phase for kill in killed.disturb(wanted)]
    assert hits == [each.phase for each in wanted]
    killed.finish()
    assert killed.differences() == []


def test_the_kills_above_cover_every_phase() -> None:
    """No phase is left out."""
    assert {each.phase for _, wanted in KILLS for each in wanted} == set(PHASES)


def test_without_the_roll_back_a_difference_appears(tmp_path: Path) -> None:
    """The state store kept what the engine never committed: if it stays, events count twice."""
    plan = Plan("fraud", "event_time", flush=1, events=2000, checkpoint=0.2, without="roll_back")
    killed = trial(plan, tmp_path)
    (kill,) = killed.disturb([Wanted("running", "all", 1)])
    assert kill.wreck is not None
    assert kill.wreck.rows > 0
    with pytest.raises((Fault, AssertionError)):
        killed.finish()
        assert killed.differences() == []


# -- stale snapshots


def feed_and_stop(disturbed: Trial, lines: int) -> Run:
    """Feed so many lines, let a run read them, and stop it."""
    disturbed.inputs.feed(lines)
    run = disturbed.start(follow=True)
    sizes = {path.name: path.stat().st_size for path in disturbed.inputs.paths.values()}
    try:
        until(
            lambda: run.code is not None or has_read(disturbed.plan.reference, run.directory, sizes),
            "does not read what it is fed",
        )
        if run.code is None:
            run.stop()
        return run
    finally:
        run.clean_up()


def leave_a_snapshot(disturbed: Trial, step: str, key: str, more: int) -> None:
    """What the engine leaves when it dies between writing an epoch's snapshots and ending it."""
    recovery = RunDirectory(disturbed.out).recovery(1)
    with closing(sqlite3.connect(recovery / "part-0.sqlite3")) as database, database:
        found = database.execute(
            "SELECT step_id, state_key, ser_change FROM snaps WHERE step_id LIKE ? AND state_key LIKE ? "
            "ORDER BY snap_epoch DESC",
            (f"{disturbed.job.name}.{step}%", f"{key}%"),
        ).fetchone()
        row = (found[0], found[1], resume_epoch(recovery), pickle.dumps(pickle.loads(found[2]) + more))
        database.execute("INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) VALUES (?, ?, ?, ?)", row)
