"""The order log: how each batch was made, appended before it leaves, so that a resume can form it again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import msgspec

IDLE = 0
DONE = -1
OPENED = -2
JUMPED = -3
"""In place of a number of pulled records: the partition was judged idle, came to its end, was taken in, or goes on at a
later place because what came next is gone."""

ALL_READY = -1
"""In place of the number of items: the batch takes all that is ready once its records are pulled. In the log of a job
that follows another's order, but holds events back otherwise or reads other records."""


class OrderLogError(RuntimeError):
    """The order log or an input no longer agrees with the checkpoint."""


class LogEntry(msgspec.Struct, frozen=True, array_like=True):
    """How one batch was made: its number, the pulls before it, the items in it, the watermark, the end.

    A pull is (partition, number of records), or (partition, what became of it): `OPENED`, `JUMPED`, `IDLE` or `DONE`.

    In place of the number of items there may be `ALL_READY`.

    `begins` has one entry for each `OPENED` and `JUMPED`, in the order of `pulls`: the offset at which the partition
    goes on. `ends` has, by partition, the offset that comes after the batch. Both are for partitions whose records have
    numbers of their own (Kafka's offsets); for others the entry is None, or missing. `at` is the wall clock (ms since
    1970) when the batch was formed first; nothing depends on it, but people ask what the job knew then.
    """

    number: int
    pulls: list[tuple[str, int]]
    count: int
    watermark: int | None
    end: bool
    begins: list[int | None] = []
    ends: dict[str, int] = {}
    at: int = 0


class OrderLog:
    """Appends the make-up of each batch to a file, one JSON line each.

    Opening cuts a torn last line (the process died while writing) and nothing else. One that is not `writable` leaves
    the file as it is, also while a run writes it, and passes a torn last line over.
    """

    def __init__(self, path: Path, writable: bool = True) -> None:
        self._path = path
        self._file: FileIO | None = None
        if writable:
            self._cut_torn_tail()
            self._file = path.open("ab", buffering=0)

    def _cut_torn_tail(self) -> None:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)

    def append(self, entry: LogEntry) -> None:
        """Write before the batch leaves; on return it survives the death of the process."""
        if self._file is None:
            raise OrderLogError(f"{self._path} was opened to be read")
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def after(self, number: int) -> Iterator[LogEntry]:
        """The entries of the batches after `number`."""
        decoder = msgspec.json.Decoder(LogEntry)
        with self._path.open("rb") as lines:
            for row, line in enumerate(lines, 1):
                if self._file is None and not line.endswith(b"\n"):
                    return
                try:
                    entry = decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise OrderLogError(f"{self._path}:{row}: damaged entry of the order log ({error})") from None
                if entry.number > number:
                    yield entry

    def close(self) -> None:
        """Give the file up."""
        if self._file is not None:
            self._file.close()


class LogChain:
    """The order logs of several branches as the one way to the last of them, to be read.

    The log of a branch need not be there if nothing is asked of it: a fork has none of the branches before it.

    Parameters
    ----------
    parts
        Each branch's log and its last batch on the way; None: all that there are.
    until
        The last batch to be seen.
    """

    def __init__(self, parts: Iterable[tuple[Path, int | None]], until: int | None = None) -> None:
        self._parts = list(parts)
        self._until = until

    def append(self, entry: LogEntry) -> None:
        """Past batches are read, and no others made."""
        raise OrderLogError("an order log of the past was opened to be read")

    def after(self, number: int) -> Iterator[LogEntry]:
        """The entries of the batches after `number`. Raises `OrderLogError` for a log that is missing."""
        for path, last in self._parts:
            if last is not None and last <= number:
                continue
            if not path.exists():
                raise OrderLogError(f"the order log {path} is missing, and with it what came after batch {number}")
            for entry in OrderLog(path, writable=False).after(number):
                if (last is not None and entry.number > last) or (
                    self._until is not None and entry.number > self._until
                ):
                    break
                number = entry.number
                yield entry

    def close(self) -> None:
        """Nothing is held open."""
