"""What a kill left behind, read from a copy: so that a table can say what the next start had to mend."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec

from dataflows.checkpoints import Checkpoints
from dataflows.job import KINDS, Job
from dataflows.orderlog import LogEntry
from dataflows.recovery import committed, resume_epoch
from dataflows.settings import RunDirectory, read_branches
from dataflows.state import READER, StateError, StateFile, Version


class Wreck(NamedTuple):
    """By what there was to mend, how much of it."""

    rows: int = 0
    """Rows of the state store after what the engine has committed."""
    ahead: int = 0
    """1 if the store has a checkpoint that the engine has not."""
    snapshots: int = 0
    """Snapshots of the engine of an epoch that it never finished."""
    output: int = 0
    """Bytes of output after the checkpoint."""
    batches: int = 0
    """Batches of the order log to be formed again."""
    torn: int = 0
    """1 if the order log ends in half a line."""
    unwritten: int = 0
    """1 if the newest checkpoint has no manifest."""
    unpruned: int = 0
    """Manifests that were dropped and whose rows are still there."""
    fresh: int = 0
    """1 if the state was not created yet."""


MEANINGS = {
    "rows": "rows of the state store newer than what the engine had committed",
    "ahead": "a checkpoint that the state store had and the engine did not",
    "snapshots": "engine snapshots of an unfinished epoch",
    "output": "outputs longer than at the checkpoint",
    "batches": "batches to be formed again from the order log",
    "torn": "a torn line in the order log",
    "unwritten": "a committed checkpoint without a manifest",
    "unpruned": "a dropped checkpoint not pruned yet",
    "fresh": "a state directory that was not complete",
}


def inspect(job: Job, directory: Path) -> Wreck:
    """Look at what is there, without touching it: opening SQLite's files would already mend them."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = RunDirectory(Path(scratch))
        original = RunDirectory(directory)
        if not original.job.exists():
            return Wreck(fresh=1)
        shutil.copytree(original.state, copy.state, ignore=shutil.ignore_patterns("lock", "*.log"))
        shutil.copytree(original.order_log(1).parent, copy.order_log(1).parent, dirs_exist_ok=True)
        return _inspect(job, copy, directory)


def _inspect(job: Job, run: RunDirectory, outputs: Path) -> Wreck:
    branch = read_branches(run)[-1]
    recovery = run.recovery(branch.branch)
    found = committed(recovery, job.name, branch.layout)
    batch = branch.batch if found.reader is None else int(found.reader["batch"])
    version = Version(branch.branch, batch)
    sinks = branch.sinks | found.sinks
    sizes = {kind: _size(outputs / f"{kind}.jsonl") for kind in KINDS}
    content = run.order_log(branch.branch).read_bytes()
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    numbers = [msgspec.json.decode(line, type=LogEntry).number for line in whole]
    manifests = [m.version for m in Checkpoints(run).all()]
    return Wreck(
        rows=sum(_rows_after(path, version) for path in sorted(run.groups.glob("*.sqlite3"))),
        ahead=int(_newest_commit(run) > version.number),
        snapshots=_snapshots(recovery),
        output=sum(size - sinks.get(kind, 0) for kind, size in sizes.items()),
        batches=sum(number > batch for number in numbers),
        torn=int(not content.endswith(b"\n") and bool(content)),
        unwritten=int(found.reader is not None and version not in manifests),
        unpruned=len(list(run.checkpoints.glob("*.dropped"))),
    )


def _rows_after(path: Path, version: Version) -> int:
    try:
        file = StateFile(path, path.stem)
    except StateError:
        return 0
    with closing(file):
        return int(file.query("SELECT count(*) FROM rows WHERE version > ?", (version.number,))[0][0])


def _newest_commit(run: RunDirectory) -> int:
    with closing(StateFile(run.groups / f"{READER}.sqlite3", READER)) as file:
        return int(file.query("SELECT coalesce(max(version), 0) FROM commits")[0][0])


def _snapshots(recovery: Path) -> int:
    epoch = resume_epoch(recovery)
    with closing(sqlite3.connect(recovery / "part-0.sqlite3")) as database:
        return int(database.execute("SELECT count(*) FROM snaps WHERE snap_epoch >= ?", (epoch,)).fetchone()[0])


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
