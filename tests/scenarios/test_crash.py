"""A few crash tests of `make chaos`, and that they can fail: without what mends a crash, a difference appears."""

from __future__ import annotations

import json
import pickle
import random
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from dataflows.recovery import resume_epoch
from dataflows.settings import RunDirectory
from tests.chaos.killer import PHASES, Killer, Wanted
from tests.chaos.runs import until
from tests.chaos.trial import Plan, Trial

KILLS = [
    (
        Plan("fraud", "event_time", (1, 2), fed=True, flush=8, kept=2, cache=60, events=2500, rate=2500),
        [
            Wanted("start", "launcher"),
            Wanted("snapshot", "all", 1),
            Wanted("committing", "launcher", 1),
            Wanted("prune", "all", 3),
        ],
    ),
    (
        Plan("shops", "arrival", (2, 1), fed=True, stopped=True, flush=64, events=1500, rate=2500),
        [Wanted("running", "worker", 2), Wanted("manifest", "launcher", 1), Wanted("committing", "worker", 1)],
    ),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs go that nothing happens to; the tests share them."""
    return tmp_path_factory.mktemp("undisturbed")


def trial(plan: Plan, directory: Path, undisturbed: Path) -> Trial:
    """A trial within a test's directory."""
    return Trial(plan, directory / "trial", undisturbed, Killer(random.Random(1)))


@pytest.mark.parametrize(("plan", "wanted"), KILLS, ids=lambda value: value.job if isinstance(value, Plan) else "")
def test_a_run_that_is_killed_again_and_again_gives_what_an_undisturbed_one_gives(
    plan: Plan, wanted: list[Wanted], tmp_path: Path, undisturbed: Path
) -> None:
    """Outputs byte for byte and all state to the last bit, for kills in every phase, both orders, 1 and 2 processes."""
    killed = trial(plan, tmp_path, undisturbed)
    hits = [kill.hit.phase for kill in killed.disturb(wanted)]
    # On a busy machine the input may be at its end before the last short phase is met; `make chaos` counts them all.
    assert hits in ([each.phase for each in wanted], [each.phase for each in wanted][:-1])
    killed.finish()
    assert list(killed.differences()) == []


def test_the_kills_above_cover_every_phase() -> None:
    """No phase is left out."""
    assert {each.phase for _, wanted in KILLS for each in wanted} == set(PHASES)


def test_without_the_roll_back_a_difference_appears(tmp_path: Path, undisturbed: Path) -> None:
    """The state store kept what the engine never committed: if it stays, events count twice."""
    plan = Plan("fraud", "event_time", flush=1, events=2000, checkpoint=0.2, without="roll_back")
    killed = trial(plan, tmp_path, undisturbed)
    (kill,) = killed.disturb([Wanted("running", "all", 1)])
    assert kill.wreck is not None
    assert kill.wreck.rows > 0
    killed.finish()
    assert next(killed.differences()).startswith("predictions")


@pytest.mark.parametrize(("without", "twice"), [("", 0), ("stale_snapshots", 1)])
def test_without_removing_stale_snapshots_a_record_is_written_twice(
    without: str, twice: int, tmp_path: Path, undisturbed: Path
) -> None:
    """A position that the engine kept of an epoch it never ended is believed after a second kill, unless removed.

    What two kills can leave is put there by hand, as they would have to come within less than a millisecond:

    1. Killed between writing an epoch's snapshots and ending it, in which a reject was written: its sink's position,
       reject included, stays under that epoch.
    2. The next start ends this epoch before the batch with the reject, so no newer position takes the place of the old.
    3. Killed after it has written the reject, before the next checkpoint.
    """
    plan = Plan("fraud", "arrival", events=500, without=without)
    disturbed = trial(plan, tmp_path, undisturbed)
    first, second, before, reject = quiet_lines(disturbed, after=200)
    feed_and_stop(disturbed, first, before)
    leave_position(disturbed, "rejects", len(reject) + 1)
    feed_and_stop(disturbed, second, before)
    with (disturbed.out / "rejects.jsonl").open("ab") as file:
        file.write(reject + b"\n")
    disturbed.finish()
    expected, found = (rejects_of(directory) for directory in (disturbed.from_whole_input(), disturbed.out))
    assert found.keys() == expected.keys()
    assert [records for records in found.values() if len(records) > 1] == [[reject, reject]] * twice


def rejects_of(directory: Path) -> dict[int, list[bytes]]:
    """The rejects of a run by the line of the input."""
    found: dict[int, list[bytes]] = {}
    for record in (directory / "rejects.jsonl").read_bytes().splitlines():
        found.setdefault(int(json.loads(record)["place"].rpartition(":")[2]), []).append(record)
    return found


def quiet_lines(disturbed: Trial, after: int) -> tuple[int, int, bytes, bytes]:
    """How many lines to feed first, and then, so that the second part gives no reject; the rejects before and after it.

    The one after is one that the reader gives, as these come first in their batch.
    """
    records = {row: found for row, (found,) in rejects_of(disturbed.from_whole_input()).items()}
    for begin, end in pairwise(sorted(records)):
        if begin > after and end - begin > 10 and b"duplicate_event" not in records[end]:
            return begin, end - begin - 1, records[begin], records[end]
    raise AssertionError("no such lines")


def feed_and_stop(disturbed: Trial, lines: int, last: bytes) -> None:
    """Feed so many lines, have a run read them, until this reject is written too, and stop it."""
    disturbed.inputs.feed(lines)
    rejects = disturbed.out / "rejects.jsonl"
    run = disturbed.start(follow=True)
    try:
        until(lambda: run.code is not None or (rejects.exists() and last in rejects.read_bytes()), "no such reject")
        disturbed.stop_when_read(run)
    finally:
        run.clean_up()


def leave_position(disturbed: Trial, kind: str, more: int) -> None:
    """What the engine leaves of a sink when it dies between writing an epoch's snapshots and ending it."""
    recovery = RunDirectory(disturbed.out).recovery(1)
    with closing(sqlite3.connect(recovery / "part-0.sqlite3")) as database, database:
        step, position = database.execute(
            "SELECT step_id, ser_change FROM snaps WHERE state_key = ? ORDER BY snap_epoch DESC", (kind,)
        ).fetchone()
        row = (step, kind, resume_epoch(recovery), pickle.dumps(pickle.loads(position) + more))
        database.execute("INSERT INTO snaps (step_id, state_key, snap_epoch, ser_change) VALUES (?, ?, ?, ?)", row)
