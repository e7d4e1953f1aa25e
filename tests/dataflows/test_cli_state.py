"""The commands that look into state, over states made by hand; with a live job: tests/scenarios."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.cli_state import _up_to_now, checkpoints
from dataflows.control import Control
from dataflows.runtime import lock_state
from dataflows.settings import RunDirectory
from dataflows.startup import RunError
from dataflows.state import StateStore

JOB = "tests.scenarios.keystone_jobs:linear_event_time"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A state with two checkpoints."""
    made = RunDirectory(tmp_path)
    StateStore.create(made.groups, 1)
    made.job.write_text("{}")
    for batch in (4, 7):
        Checkpoints(made).add(Manifest(branch=1, batch=batch, written_at="2026-01-30T21:00:00.000+00:00"))
    return made


@pytest.fixture
def running(run: RunDirectory) -> Iterator[RunDirectory]:
    """The same, in use by a run."""
    lock = lock_state(run.state)
    yield run
    os.close(lock)


def test_every_savepoint_of_a_checkpoint_is_listed(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint may be kept under several names; the table and the JSON show all of them."""
    kept = Checkpoints(run)
    for name, version in (("monday", "1-4"), ("audit", "1-4"), ("tuesday", "1-7")):
        kept.name(name, kept.find(version))
    checkpoints(JOB, run.path, verify=False, delete=None, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["checkpoint"]: row["savepoints"] for row in rows} == {"1-4": ["audit", "monday"], "1-7": ["tuesday"]}
    checkpoints(JOB, run.path, verify=False, delete=None, as_json=False)
    table = capsys.readouterr().out
    assert "audit, monday" in table
    assert "tuesday" in table


def test_a_savepoint_waits_for_all_that_is_published(running: RunDirectory) -> None:
    """What counts is the newest batch that went all the way, not the one that people were last shown."""
    running.status.write_text('{"batch": 6}')
    Control(running.control).published = 9
    with pytest.raises(RunError, match="no checkpoint of batch 9 came within 0 s"):
        _up_to_now(running, Checkpoints(running), 0.1)
    Control(running.control).published = 7
    assert _up_to_now(running, Checkpoints(running), 0.1).batch == 7
