"""Where records of a transactional output wait for their transaction: a file for each interval between checkpoints.

    000000000001-000000000420.msgpack   complete: records 1 to 420, in order
    000000000421.open                   what came since; thrown away when a run begins

A file becomes complete at a checkpoint and is deleted once its records are in the topic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dataflows.connectors.kafka.topic import Encoded

_DECODER: msgspec.msgpack.Decoder[list[Encoded]] = msgspec.msgpack.Decoder(list[Encoded])


class Segment(NamedTuple):
    """A complete file: the numbers of its first and last record."""

    first: int
    last: int
    path: Path


class Outbox:
    """The files of one output on one branch. One process at a time may use them; `begin` comes first.

    Parameters
    ----------
    directory
        Where they lie; made if need be.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Any = None
        self._first = 1
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, count: int) -> None:
        """Go on after record `count`, the last that the checkpoint holds; what came after it is thrown away."""
        for path in self._directory.glob("*.open"):
            path.unlink()
        for segment in self.complete():
            if segment.last > count:
                segment.path.unlink()
        self._first = count + 1

    def complete(self) -> list[Segment]:
        """The complete files, oldest first."""
        found = []
        for path in sorted(self._directory.glob("*.msgpack")):
            first, _, last = path.stem.partition("-")
            found.append(Segment(int(first), int(last), path))
        return found

    def add(self, records: list[Encoded]) -> None:
        """Keep records for the next checkpoint."""
        if self._file is None:
            self._file = (self._directory / f"{self._first:012d}.open").open("wb")
        packed = msgspec.msgpack.encode(records)
        self._file.write(len(packed).to_bytes(4, "big") + packed)

    def close_at(self, count: int) -> None:
        """A checkpoint: what was added, up to record `count`, becomes a complete file, on the disk when this returns.

        The checkpoint itself may still fail: then `begin` throws the file away.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            path = self._directory / f"{self._first:012d}.open"
            path.rename(self._directory / f"{self._first:012d}-{count:012d}.msgpack")
            descriptor = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._first = count + 1

    def close(self) -> None:
        """Close the open file, which no checkpoint holds; the next `begin` deletes it."""
        if self._file is not None:
            self._file.close()


def read(segment: Segment) -> Iterator[Encoded]:
    """The records of a complete file, in order."""
    with segment.path.open("rb") as file:
        while head := file.read(4):
            yield from _DECODER.decode(file.read(int.from_bytes(head, "big")))
