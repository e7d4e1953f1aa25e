"""The engine's recovery store, read from outside: what it has committed, and the rows it must not find again.

Bytewax 0.21 keeps in SQLite, by execution and worker, the epoch each worker has reached (`exs`, `fronts`), and by step
and key what `snapshot` returned (`snaps`). It resumes at the smallest frontier of the newest execution, with the newest
snapshots of earlier epochs.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dataflows.job import KINDS
from dataflows.pickles import safe_loads
from dataflows.settings import Layout
from dataflows.state import READER, StateError, group_file

_STEPS_OF_READER = ("read", "admit")
"""The steps whose rows are in the reader's file; to the engine they are one."""

_HINT = "Hint: `millrace run JOB --from CHECKPOINT` goes on from a checkpoint of `millrace checkpoints JOB`"


class Committed(NamedTuple):
    """What the engine would resume from.

    `reader` is what the reader said of itself (`dataflows.flow.ReadPartition.snapshot`), None before the first
    checkpoint; `parts` by state file and name of rows the last batch that was worked on, of the steps that were touched
    on this branch; `sinks` positions by kind of record.
    """

    epoch: int
    reader: dict[str, Any] | None
    parts: dict[str, dict[str, int]]
    sinks: dict[str, Any]


def create_recovery(recovery: Path) -> None:
    """Make the engine's store of a new branch; one that is there is replaced."""
    from bytewax.recovery import init_db_dir

    shutil.rmtree(recovery, ignore_errors=True)
    recovery.mkdir(parents=True)
    init_db_dir(recovery, 1)


def resume_epoch(recovery: Path) -> int:
    """The epoch at which the engine will go on; 1 when there was no run."""
    with _opened(recovery) as database:
        return _resume_epoch(database)


def committed(recovery: Path, flow: str, layout: Layout) -> Committed:
    """What the engine has committed of a flow, as one consistent view, also while it runs.

    `layout` tells which names the rows of a feature step have.
    """
    with _opened(recovery) as database:
        database.execute("BEGIN")
        epoch = _resume_epoch(database)
        rows = database.execute(
            "SELECT step_id, state_key, ser_change FROM snaps WHERE snap_epoch < ? ORDER BY snap_epoch", (epoch,)
        ).fetchall()
    newest = {(step, key): change for step, key, change in rows}
    reader: dict[str, Any] | None = None
    parts: dict[str, dict[str, int]] = {}
    sinks: dict[str, Any] = {}
    for (step_id, key), change in newest.items():
        if change is None:
            continue
        step = step_id.removeprefix(f"{flow}.").split(".")[0]
        try:
            state = safe_loads(change)
            if step == "read":
                said: dict[str, Any] = msgspec.json.decode(state, type=dict[str, Any])
                parts[READER] = dict.fromkeys(_STEPS_OF_READER, said["batch"])
                reader = said
            elif step == "write":
                if key in KINDS:
                    sinks[key] = state
            else:  # a step of a key group, which the engine's key begins with
                names = [part.rows for part in layout.features.get(step, ())] or [step]
                parts.setdefault(group_file(int(key.split(".")[0])), {}).update(dict.fromkeys(names, state))
        except Exception as error:  # noqa: BLE001 - whatever a damaged pickle raises
            raise _damaged(recovery, f"step {step_id}, key {key!r}: {type(error).__name__}: {error}") from None
    return Committed(epoch, reader, parts, sinks)


class CommitWatch:
    """Says what the engine has committed whenever that has changed; looking in vain is cheap."""

    def __init__(self, recovery: Path, flow: str, layout: Layout) -> None:
        self._recovery = recovery
        self._flow = flow
        self._layout = layout
        self._epoch = 0

    def __call__(self) -> Committed | None:
        """What is committed now; None if it is what it was at the last call."""
        if resume_epoch(self._recovery) == self._epoch:
            return None
        found = committed(self._recovery, self._flow, self._layout)
        self._epoch = found.epoch
        return found


def step_ids(recovery: Path) -> set[str]:
    """The ids of the steps that the engine holds state of."""
    with _opened(recovery) as database:
        return {step for (step,) in database.execute("SELECT DISTINCT step_id FROM snaps")}


def remove_stale_snapshots(recovery: Path) -> int:
    """Delete snapshots of epochs that were never finished; how many there were.

    Bytewax 0.21 leaves rows of an unfinished epoch behind when it is killed between writing the snapshots and
    the frontier, and may load them after a second kill: an event would count twice.
    """
    with _opened(recovery) as database, database:
        return database.execute("DELETE FROM snaps WHERE snap_epoch >= ?", (_resume_epoch(database),)).rowcount


def _resume_epoch(database: sqlite3.Connection) -> int:
    executions = database.execute(
        "SELECT ex_num, worker_count, resume_epoch FROM exs ORDER BY ex_num DESC LIMIT 1"
    ).fetchall()
    if not executions:
        return 1
    number, workers, start = executions[0]
    reached = database.execute("SELECT worker_frontier FROM fronts WHERE ex_num = ?", (number,)).fetchall()
    return min(frontier for (frontier,) in reached) if len(reached) == workers else int(start)


@contextmanager
def _opened(recovery: Path) -> Iterator[sqlite3.Connection]:
    """The engine's store; what SQLite has against it as `StateError`."""
    file = _file(recovery)
    if not file.exists():
        raise StateError(
            f"the engine's recovery store {file} is missing, so it cannot be told how far the job got. {_HINT}"
        )
    try:
        with closing(sqlite3.connect(file, timeout=30.0)) as database:
            yield database
    except sqlite3.Error as error:
        raise _damaged(recovery, str(error)) from None


def _damaged(recovery: Path, what: str) -> StateError:
    return StateError(f"the engine's recovery store {_file(recovery)} is damaged: {what}. {_HINT}")


def _file(recovery: Path) -> Path:
    return recovery / "part-0.sqlite3"
