"""Many small values by growing number, kept as rows of up to 256: open questions, remembered ids, buffered items.

A row for each value would cost more than the value. What came since the last checkpoint is written as chunks, and never
again; of a value that goes only its bit in the chunk's small mask is cleared, and the chunk goes with its last value.
So what is written follows what came and went, however many there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from features.rows import GONE, Change, Rows, put

SIZE = 256
"""Values in a chunk at the most."""

SPAN = 4096
"""Numbers a chunk reaches over at the most: bits in its mask."""


class _Chunk:
    __slots__ = ("left", "mask", "masked")

    def __init__(self, left: int, mask: int, masked: bool) -> None:
        self.left = left  # values that are still there
        self.mask = mask  # bit i: the value of number start + i is still there
        self.masked = masked  # its mask has a row


class Chunks:
    """The rows behind a dict from growing numbers to values, which stays with the holder.

    >>> from features.rows import MemoryRows
    >>> rows, chunks = MemoryRows(), Chunks("open")
    >>> rows.apply(chunks.changes([(1, "a"), (2, "b"), (5, "c")], []))
    >>> rows.apply(chunks.changes([(6, "d")], [2, 4]))
    >>> list(Chunks("open").restore(rows))
    [(1, 'a'), (5, 'c'), (6, 'd')]
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._starts: list[int] = []  # of the chunks, growing
        self._chunks: dict[int, _Chunk] = {}
        self._amended: set[int] = set()  # numbers whose newest value has a row of its own

    def changes(
        self, added: Iterable[tuple[int, Any]], removed: Iterable[int], amended: Iterable[tuple[int, Any]] = ()
    ) -> Iterator[Change]:
        """Rows for what came, went and changed since the last call.

        `added` come in order, with numbers above all before. `removed` may name numbers that were never added. Of
        an `amended` value only the newest counts; it must have been added and not removed.
        """
        for number, value in amended:
            self._amended.add(number)
            yield put(self._amended_key(number), value)
        yield from self._remove(removed)
        chunk: list[tuple[int, Any]] = []
        for entry in added:
            if chunk and (len(chunk) == SIZE or entry[0] >= chunk[0][0] + SPAN):
                yield self._add(chunk)
                chunk = []
            chunk.append(entry)
        if chunk:
            yield self._add(chunk)

    def restore(self, rows: Rows) -> Iterator[tuple[int, Any]]:
        """The values that are there, by number; ready to go on with `changes` when all were taken."""
        masks = {key: parts[0] for key, parts in rows.scan(f"{self._name}-mask/")}
        changed = {key: parts[0] for key, parts in rows.scan(f"{self._name}-amended/")}
        for _, (entries,) in rows.scan(f"{self._name}/"):
            start = entries[0][0]
            mask = masks.get(self._mask_key(start))
            if mask is not None:
                entries = [entry for entry in entries if mask >> (entry[0] - start) & 1]
            self._insert(start, entries, mask is not None)
            for number, value in entries:
                amended = self._amended_key(number)
                if amended in changed:
                    self._amended.add(number)
                    value = changed[amended]
                yield number, value

    def clear(self) -> Iterator[Change]:
        """Rows for the loss of all values."""
        for start in self._starts:
            yield from self._drop(start)
        yield from ((self._amended_key(number), GONE, b"") for number in self._amended)
        self._starts, self._chunks, self._amended = [], {}, set()

    def _add(self, entries: list[tuple[int, Any]]) -> Change:
        start = entries[0][0]
        self._insert(start, entries, False)
        return put(self._key(start), entries)

    def _insert(self, start: int, entries: list[tuple[int, Any]], masked: bool) -> None:
        mask = 0
        for number, _ in entries:
            mask |= 1 << (number - start)
        self._starts.append(start)
        self._chunks[start] = _Chunk(len(entries), mask, masked)

    def _remove(self, removed: Iterable[int]) -> Iterator[Change]:
        starts, chunks = self._starts, self._chunks
        touched: dict[int, None] = {}
        start, end = 0, 0  # of the chunk of the number before: many go one after the other
        for number in removed:
            if not start <= number < end:
                at = bisect_right(starts, number)
                if at == 0:
                    continue
                start = starts[at - 1]
                end = starts[at] if at < len(starts) else number + 1
            chunk = chunks[start]
            bit = 1 << (number - start) if number - start < SPAN else 0
            if chunk.mask & bit:
                chunk.mask ^= bit
                chunk.left -= 1
                touched[start] = None
                if number in self._amended:
                    self._amended.discard(number)
                    yield self._amended_key(number), GONE, b""
        for start in touched:
            if chunks[start].left:
                chunks[start].masked = True
                yield put(self._mask_key(start), chunks[start].mask)
            else:
                yield from self._drop(start)
                del chunks[start]
                del starts[bisect_right(starts, start) - 1]

    def _drop(self, start: int) -> Iterator[Change]:
        yield self._key(start), GONE, b""
        if self._chunks[start].masked:
            yield self._mask_key(start), GONE, b""

    def _key(self, start: int) -> str:
        return f"{self._name}/{start:016x}"

    def _mask_key(self, start: int) -> str:
        return f"{self._name}-mask/{start:016x}"

    def _amended_key(self, number: int) -> str:
        return f"{self._name}-amended/{number:016x}"
