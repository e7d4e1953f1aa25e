"""What the processes of a run tell each other through shared memory and a small file."""

from __future__ import annotations

import mmap
import os
import struct
import time as wall
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec


class Phase(IntEnum):
    """What workers, or the launcher, are at; for people and tests to see."""

    NONE = 0
    RUNNING = 1
    SNAPSHOT = 2
    """Workers write a checkpoint to the state store."""
    COMMITTING = 3
    """The state store has the checkpoint, the engine is not known to have it."""
    START = 4
    """The launcher makes the state ready, or the reader opens what it keeps."""
    MANIFEST = 5
    PRUNE = 6
    WATCHING = 7


_SIZE = 64
_PUBLISHED, _STOP, _WORKERS, _LAUNCHER, _PUBLISHED_AT, _STALL = 0, 8, 9, 10, 16, 24
"""Where each value begins, in bytes."""


class Control:
    """A few values shared by all processes of a run: the newest published batch, the wish to stop, what each is at.

    A memory-mapped file, because the reader and the publisher may sit in different processes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < _SIZE:
                file.truncate(_SIZE)
            self._map = mmap.mmap(file.fileno(), _SIZE)

    def restart(self) -> None:
        """Forget the run before; before any process of a run is started."""
        self._map[:] = bytes(_SIZE)

    @property
    def published(self) -> int:
        """Number of the newest batch that went all the way."""
        return struct.unpack_from("<q", self._map, _PUBLISHED)[0]  # type: ignore[no-any-return]

    @published.setter
    def published(self, number: int) -> None:
        struct.pack_into("<q", self._map, _PUBLISHED, number)

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop after its current batch, with a last checkpoint."""
        return self._map[_STOP] != 0

    def stop(self) -> None:
        """Ask the reader to stop."""
        self._map[_STOP] = 1

    @property
    def workers(self) -> Phase:
        """What the workers are at."""
        return Phase(self._map[_WORKERS])

    @workers.setter
    def workers(self, phase: Phase) -> None:
        self._map[_WORKERS] = phase

    @property
    def launcher(self) -> Phase:
        """What the launcher is at."""
        return Phase(self._map[_LAUNCHER])

    @launcher.setter
    def launcher(self, phase: Phase) -> None:
        self._map[_LAUNCHER] = phase

    def note_published(self) -> None:
        """A batch was published now."""
        struct.pack_into("<d", self._map, _PUBLISHED_AT, wall.monotonic())

    def note_resumed(self) -> None:
        """The first batch after a checkpoint may leave now: nothing was done since the last one was published."""
        published: float = struct.unpack_from("<d", self._map, _PUBLISHED_AT)[0]
        struct.pack_into("<d", self._map, _STALL, max(wall.monotonic() - published, 0.0) if published else 0.0)

    @property
    def stall(self) -> float:
        """Seconds for which the last checkpoint let nothing pass."""
        return struct.unpack_from("<d", self._map, _STALL)[0]  # type: ignore[no-any-return]


class StatusFile:
    """What people see of a run: written a few times a second, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return wall.monotonic() >= self._next

    def write(self, status: dict[str, Any]) -> None:
        """Replace what is there."""
        self._next = wall.monotonic() + 0.25
        write_whole(self._path, msgspec.json.encode(status))


def write_whole(path: Path, content: bytes, durable: bool = False) -> None:
    """Replace a file at once, so that nobody sees half of it; `durable`: on the disk when this returns.

    Two writers of one file would write the same temporary file, so there may be one at a time.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
