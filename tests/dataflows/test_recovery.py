"""The engine's recovery store read from outside, against a real engine that is killed and goes on."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dataflows.recovery import (
    Committed,
    CommitWatch,
    committed,
    create_recovery,
    remove_stale_snapshots,
    resume_epoch,
    step_ids,
)
from dataflows.settings import FeaturePart, Layout
from dataflows.state import READER, StateError
from tests.scenarios import running

SMALL = '''
"""A flow with the steps of ours, an epoch for each batch; what each step resumed from goes to a file."""

import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.recovery import RecoveryConfig
from bytewax.testing import cluster_main, run_main

directory = Path(sys.argv[1])
how = json.loads(sys.argv[2])
resumed = (directory / "resumed.jsonl").open("w", buffering=1)


class Reader(StatefulSourcePartition):
    def __init__(self, batch):
        self.batch = batch

    def next_batch(self):
        if self.batch >= how["end"]:
            raise StopIteration
        if self.batch == how["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(how["pause"])
        self.batch += 1
        return [(f"{group:03d}.0", self.batch) for group in how["groups"]]

    def snapshot(self):
        return json.dumps({"batch": self.batch}).encode()


class Source(FixedPartitionedSource):
    def list_parts(self):
        return ["reader"]

    def build_part(self, step_id, for_part, resume_state):
        said = json.loads(resume_state) if resume_state else {"batch": 0}
        resumed.write(json.dumps(["read", said]) + "\\n")
        return Reader(said["batch"])


class Step(StatefulBatchLogic):
    def __init__(self, name, batch):
        resumed.write(json.dumps([name, batch]) + "\\n")
        self.batch = batch

    def on_batch(self, values):
        self.batch = values[-1]
        return [self.batch], StatefulBatchLogic.RETAIN

    def snapshot(self):
        return self.batch


class Writer(StatefulSinkPartition):
    def __init__(self, size):
        self.size = size

    def write_batch(self, items):
        self.size += len(items)

    def snapshot(self):
        return self.size


class Sink(FixedPartitionedSink):
    def list_parts(self):
        return ["metrics", "outcomes", "predictions", "rejects"]

    def part_fn(self, key):
        return 2

    def build_part(self, step_id, for_part, resume_state):
        return Writer(resume_state or 0)


flow = Dataflow("small")
works = op.input("read", flow, Source())
card = op.stateful_batch("features_card", works, lambda batch: Step("features_card", batch))
said = op.stateful_batch("learner", card, lambda batch: Step("learner", batch))
op.output("write", op.map("lines", said, lambda item: ("predictions", item[1])), Sink())
config = RecoveryConfig(directory / "recovery")
if how["workers"] == 1:
    run_main(flow, epoch_interval=timedelta(0), recovery_config=config)
else:
    cluster_main(flow, [], 0, epoch_interval=timedelta(0), recovery_config=config, worker_count_per_proc=how["workers"])
'''


class SmallFlow:
    """The flow of this module in processes of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.recovery = directory / "recovery"
        (directory / "small.py").write_text(SMALL)
        create_recovery(self.recovery)

    def start(self, **how: Any) -> subprocess.Popen[str]:
        """Have it run: `end` batches, or killed once it has made `kill`, for some groups."""
        how = {"end": 1000, "kill": -1, "pause": 0.0, "groups": [0, 1, 2], "workers": 1} | how
        command = [sys.executable, str(self.directory / "small.py"), str(self.directory), json.dumps(how)]
        return subprocess.Popen(command, env=running.environment(), text=True, stderr=subprocess.PIPE)

    def run(self, **how: Any) -> list[Any]:
        """Have it run to the end or the kill; what its steps resumed from."""
        process = self.start(**how)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if "kill" in how else 0), said
        return sorted(json.loads(line) for line in (self.directory / "resumed.jsonl").read_text().splitlines())

    def committed(self) -> Committed:
        """What the engine has committed of it."""
        return committed(self.recovery, "small", Layout())

    def query(self, sql: str, *values: Any) -> list[Any]:
        """Look into the engine's store, or change it, behind everybody's back."""
        with closing(sqlite3.connect(self.recovery / "part-0.sqlite3")) as database, database:
            return database.execute(sql, values).fetchall()


@pytest.fixture
def small(tmp_path: Path) -> SmallFlow:
    """A flow that never ran."""
    return SmallFlow(tmp_path)


def parts_at(batch: int) -> dict[str, dict[str, int]]:
    """All groups' steps, and the reader's, at one batch."""
    groups = {f"{group:03d}": {"features_card": batch, "learner": batch} for group in range(3)}
    return groups | {READER: {"read": batch, "admit": batch}}


def test_the_engine_goes_on_where_it_is_said_to(small: SmallFlow) -> None:
    """After kills, with one and two workers, the engine's own choice of epoch and states is what was told before."""
    assert resume_epoch(small.recovery) == 1
    assert small.committed() == Committed(1, None, {}, {})
    assert step_ids(small.recovery) == set()
    for kill, workers in ((5, 1), (9, 2), (14, 1)):
        told, epoch = small.committed(), resume_epoch(small.recovery)
        resumed = small.run(kill=kill, workers=workers)
        assert small.query("SELECT resume_epoch FROM exs ORDER BY ex_num DESC LIMIT 1") == [(epoch,)]
        assert told.epoch == epoch
        batch = 0 if told.reader is None else told.reader["batch"]
        assert ["read", {"batch": batch}] in resumed
        states = [[step, at] for steps in told.parts.values() for step, at in steps.items() if step in STEPS]
        assert [each for each in resumed if each[1] is not None and each[0] in STEPS] == sorted(states)
        found = small.committed()
        assert found.reader is not None
        assert batch < found.reader["batch"] <= kill
        assert found.parts == parts_at(found.reader["batch"])
        assert found.sinks == {"predictions": 3 * found.reader["batch"]}
    small.run(end=20)
    assert small.committed().reader == {"batch": 20}
    assert small.committed().sinks == {"predictions": 60}
    assert step_ids(small.recovery) == {"small.read", "small.features_card", "small.learner", "small.write"}


STEPS = ("features_card", "learner")


@pytest.mark.parametrize("cured", [True, False])
def test_a_snapshot_of_an_epoch_that_was_never_finished_is_removed(small: SmallFlow, cured: bool) -> None:
    """A row that a kill left behind is loaded by the engine after a second kill, unless it is removed before."""
    small.run(kill=5)
    epoch = resume_epoch(small.recovery)
    # As the engine leaves it when it is killed between the snapshots and the frontier of an epoch.
    stale = ("2026-01-01 00:00:00", "small.learner", "002.0", epoch + 1, pickle.dumps(999))
    small.query("INSERT INTO snaps VALUES (?, ?, ?, ?, ?)", *stale)
    before = small.committed()
    assert before.parts == parts_at(5)
    if cured:
        assert remove_stale_snapshots(small.recovery) == 1
        assert remove_stale_snapshots(small.recovery) == 0
        assert small.committed() == before
    small.run(kill=12, groups=[0, 1])  # nothing happens to group 2 until its stale row is older than the resume
    assert small.committed().parts["002"]["learner"] == (5 if cured else 999)
    resumed = small.run(end=13)
    assert (["learner", 999] in resumed) != cured
    assert (["learner", 5] in resumed) == cured


def test_a_look_while_the_engine_runs_sees_one_epoch(small: SmallFlow) -> None:
    """What is committed is of one epoch at any moment, and grows; a watch tells of each change once."""
    process = small.start(end=150, pause=0.004)
    watch = CommitWatch(small.recovery, "small", Layout())
    seen: list[Committed] = []
    while process.poll() is None:
        found = watch()
        if found is not None:
            seen.append(found)
        time.sleep(0.002)
    assert process.communicate()[1] == ""
    last = watch()
    assert (last or seen[-1]) == small.committed()
    assert watch() is None
    batches = [found.reader["batch"] for found in seen if found.reader is not None]
    assert len(set(batches)) > 3, "the looks all came too late"
    assert batches == sorted(batches)
    assert [found.epoch for found in seen] == sorted({found.epoch for found in seen})
    for found in seen:
        if found.reader is not None:
            assert found.parts == parts_at(found.reader["batch"])
            assert found.sinks == {"predictions": 3 * found.reader["batch"]}


def test_a_new_store_replaces_what_is_there(small: SmallFlow) -> None:
    """A branch whose making was cut short by a kill is made anew."""
    small.query("INSERT INTO exs VALUES ('2026-01-01 00:00:00', 7, 1, 70)")
    assert resume_epoch(small.recovery) == 70
    create_recovery(small.recovery)
    assert resume_epoch(small.recovery) == 1


# -- hand-made tables


def say(small: SmallFlow, *snaps: tuple[str, str, int, Any]) -> None:
    """Snapshots of an engine that has reached epoch 10 with one worker."""
    small.query("INSERT INTO exs VALUES ('2026-01-01 00:00:00', 0, 1, 1)")
    small.query("INSERT INTO fronts VALUES ('2026-01-01 00:00:00', 0, 0, 10)")
    with closing(sqlite3.connect(small.recovery / "part-0.sqlite3")) as database, database:
        for *place, state in snaps:
            change = state if isinstance(state, bytes | None) else pickle.dumps(state)
            database.execute("INSERT INTO snaps VALUES ('2026-01-01 00:00:00', ?, ?, ?, ?)", (*place, change))


def test_the_slowest_of_all_workers_decides(small: SmallFlow) -> None:
    """The resume epoch is the smallest frontier of the newest execution, or its start until all workers have said."""
    small.query("INSERT INTO exs VALUES ('2026-01-01 00:00:00', 0, 1, 1), ('2026-01-01 00:00:00', 1, 2, 6)")
    small.query("INSERT INTO fronts VALUES ('2026-01-01 00:00:00', 0, 0, 6), ('2026-01-01 00:00:00', 1, 1, 12)")
    assert resume_epoch(small.recovery) == 6
    small.query("INSERT INTO fronts VALUES ('2026-01-01 00:00:00', 1, 0, 9)")
    assert resume_epoch(small.recovery) == 9


def test_of_each_key_the_newest_finished_epoch_counts(small: SmallFlow) -> None:
    """Older epochs, unfinished ones, and keys that the engine has discarded, say nothing."""
    say(
        small,
        ("small.learner", "003.1", 4, 40),
        ("small.learner", "003.1", 8, 80),
        ("small.learner", "003.1", 10, 100),
        ("small.learner", "004.0", 5, 50),
        ("small.learner", "004.0", 9, None),
        ("small.write", "rejects", 3, 30),
        ("small.write", "unknown", 3, 30),
    )
    assert small.committed() == Committed(10, None, {"003": {"learner": 80}}, {"rejects": 30})


def test_the_layout_names_the_rows_of_feature_steps(small: SmallFlow) -> None:
    """A feature step with several parts has given a version of each; other steps have rows of their own name."""
    part = FeaturePart(rows="features_card", names=("a",), declaration="")
    parts = (part, part.model_copy(update={"rows": "features_card.2"}))
    say(small, ("small.features_card", "000.0", 4, 40), ("small.learner", "000.0", 4, 41))
    found = committed(small.recovery, "small", Layout(features={"features_card": parts}))
    assert found.parts == {"000": {"features_card": 40, "features_card.2": 40, "learner": 41}}


# -- a store that is missing or damaged

LOOKS: dict[str, Callable[[Path], Any]] = {
    "resume_epoch": resume_epoch,
    "committed": lambda recovery: committed(recovery, "small", Layout()),
    "step_ids": step_ids,
    "remove_stale_snapshots": remove_stale_snapshots,
    "watch": lambda recovery: CommitWatch(recovery, "small", Layout())(),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "tables"])
def test_a_store_that_cannot_be_read_is_a_clear_error(small: SmallFlow, look: str, damage: str) -> None:
    """Missing, empty, overwritten, cut or without its tables: the error names the file and says how to go on."""
    say(small, *(("small.learner", f"{group:03d}.0", 4, 40) for group in range(500)))
    path = small.recovery / "part-0.sqlite3"
    if damage == "tables":
        for table in ("exs", "fronts", "snaps"):
            small.query(f"DROP TABLE {table}")
    else:
        content = path.read_bytes()
        for each in small.recovery.iterdir():
            each.unlink()
        if damage != "missing":
            path.write_bytes({"empty": b"", "text": b"not a database\n" * 999, "cut": content[:5000]}[damage])
    with pytest.raises(StateError) as caught:
        LOOKS[look](small.recovery)
    assert f"the engine's recovery store {path} is {'missing' if damage == 'missing' else 'damaged'}" in str(
        caught.value
    )
    assert "Hint: `millrace run JOB --from CHECKPOINT`" in str(caught.value)
    assert path.exists() == (damage != "missing")


class Touch:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damaged_states(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Rows that no job of ours leaves: step, key, state."""
    yield "small.learner", "000.0", pickle.dumps(Touch(path))
    yield "small.learner", "000.0", b"\x80\x05no pickle"
    yield "small.learner", "somebody", pickle.dumps(4)
    yield "small.read", "reader", pickle.dumps(b'{"batch": ')
    yield "small.read", "reader", pickle.dumps(b"{}")
    yield "small.read", "reader", pickle.dumps(None)


@pytest.mark.parametrize("which", range(6))
def test_a_state_that_is_not_ours_is_a_clear_error_and_not_run(small: SmallFlow, which: int) -> None:
    """What the engine keeps of a foreign flow, or a damaged state, is refused with the file's name; no code is run."""
    step, key, state = list(damaged_states(small.directory / "touched"))[which]
    say(small, (step, key, 4, state))
    with pytest.raises(StateError) as caught:
        small.committed()
    assert f"the engine's recovery store {small.recovery / 'part-0.sqlite3'} is damaged" in str(caught.value)
    assert f"step {step}" in str(caught.value)
    assert "Hint: " in str(caught.value)
    assert not os.path.lexists(small.directory / "touched")
