"""Where the contract has holders of state keep their rows: in memory, and in real state files with versions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Protocol

from dataflows.pickles import Name
from dataflows.state import Lineage, StateStore, StepState, Version
from features.rows import Change, MemoryRows, Rows


class Shelf(Protocol):
    """Keeps the rows of a holder's parts, as the steps of one key group do."""

    def rows(self, part: str) -> Rows:
        """Where a part finds its rows."""
        ...

    def write(self, batch: int, part: str, changes: Iterable[Change], complete: bool) -> None:
        """Keep what a part gives after a batch; `complete` at a checkpoint."""
        ...

    def commit(self, batch: int) -> None:
        """All parts have given all: a later start begins here."""
        ...

    def again(self) -> Shelf:
        """What a new process finds; what came after the last checkpoint is gone."""
        ...

    def apart(self) -> Shelf:
        """The same once more, to go another way from the last checkpoint."""
        ...

    def close(self) -> None:
        """Give up files."""
        ...


class MemoryShelf:
    """Rows in dicts."""

    def __init__(self, parts: dict[str, MemoryRows] | None = None) -> None:
        self._parts = parts or {}
        self._committed = _copies(self._parts)

    def rows(self, part: str) -> Rows:
        return self._parts.setdefault(part, MemoryRows())

    def write(self, batch: int, part: str, changes: Iterable[Change], complete: bool) -> None:
        self._parts[part].apply(changes)

    def commit(self, batch: int) -> None:
        self._committed = _copies(self._parts)

    def again(self) -> MemoryShelf:
        return MemoryShelf(_copies(self._committed))

    def apart(self) -> MemoryShelf:
        return self.again()

    def close(self) -> None:
        return


def _copies(parts: dict[str, MemoryRows]) -> dict[str, MemoryRows]:
    copies = {}
    for name, rows in parts.items():
        copies[name] = MemoryRows()
        copies[name]._parts = {key: list(each) for key, each in rows._parts.items()}
    return copies


BEGINNING = Version(1, 0)


class FileShelf:
    """One state file; each start rolls back to the last checkpoint, each way apart is a branch of its own."""

    _numbers = count()

    def __init__(
        self,
        directory: Path,
        allowed: frozenset[Name],
        start: Version = BEGINNING,
        forks: tuple[Version, ...] = (),
    ) -> None:
        self._allowed = allowed
        self._committed = start
        self._forks = forks
        self._directory = directory
        StateStore.create(directory, 1)
        self._store = StateStore(directory, Lineage(forks, start), allowed=allowed)
        self._steps: dict[str, StepState] = {}

    def rows(self, part: str) -> Rows:
        return self._step(part).rows

    def write(self, batch: int, part: str, changes: Iterable[Change], complete: bool) -> None:
        self._step(part).write(batch, changes, complete)

    def commit(self, batch: int) -> None:
        self._committed = Version(self._committed.branch, batch)

    def again(self) -> FileShelf:
        self._store.file("000").roll_back(self._committed)
        self.close()
        return FileShelf(self._directory, self._allowed, self._committed, self._forks)

    def apart(self) -> FileShelf:
        before = self._committed
        copy = self._directory.with_name(f"{next(self._numbers)}")
        shutil.copytree(self._directory, copy, ignore=shutil.ignore_patterns("*-shm"))
        return FileShelf(copy, self._allowed, Version(before.branch + 1, before.batch), (*self._forks, before))

    def close(self) -> None:
        self._store.close()

    def _step(self, part: str) -> StepState:
        if part not in self._steps:
            self._steps[part] = self._store.step("000", part)
        return self._steps[part]
