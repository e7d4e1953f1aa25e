"""What admit remembers for a while, under a bound: ids that were seen, labels that came before their question."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from math import inf
from typing import Any

from dataflows.chunks import Chunks
from dataflows.events import Raw
from features.rows import Change, Rows


class Remembered:
    """Keys, some with a value, of which the oldest are forgotten beyond a bound.

    `numbers` holds the keys that are remembered, and is to be read only. `name` is that of the rows.

    >>> seen = Remembered("ids", 2)
    >>> [seen.add(key) for key in "abcb"], list(seen.numbers)
    ([0, 0, 1, 0], ['b', 'c'])
    """

    __slots__ = (
        "limit",
        "numbers",
        "_chunks",
        "_forgotten",
        "_newest",
        "_order",
        "_kept",
        "_revised",
        "_tracks",
        "_values",
    )

    def __init__(self, name: str, limit: int, rows: Rows | None = None) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.limit = limit
        self._values: dict[int, Any] = {}
        self._order: deque[Hashable] = deque()
        self._newest = self._kept = 0  # numbers: the last one given, the last one that `changes` has given
        self._chunks = Chunks(name)
        self._tracks = rows is not None  # else nobody asks for `changes`
        self._forgotten: list[int] = []
        self._revised: set[Hashable] = set()
        if rows is not None:
            self._restore(rows)

    def add(self, key: Hashable, value: Any = None) -> int:
        """Remember; how many keys were forgotten for it. A key that is there keeps its place and gets the value."""
        number = self.numbers.get(key)
        if number is None:
            self._newest = self.numbers[key] = number = self._newest + 1
            self._order.append(key)
        elif self._tracks:
            self._revised.add(key)
        if value is not None:
            self._values[number] = value
        else:
            self._values.pop(number, None)
        return self._forget(self.limit) if len(self._order) > self.limit else 0

    def get(self, key: Hashable, default: Any) -> Any:
        """The value of a key, which may be None; the default for a key that is not remembered."""
        number = self.numbers.get(key)
        return default if number is None else self._values.get(number)

    def clear(self) -> None:
        """Forget all."""
        self._forget(0)

    def changes(self) -> Iterator[Change]:
        """What the rows need to follow since the last call."""
        kept, self._kept = self._kept, self._newest
        forgotten, self._forgotten = self._forgotten, []
        revised, self._revised = self._revised, set()
        values, order = self._values, self._order
        new = [order[i] for i in range(-min(self._newest - kept, len(order)), 0)]
        # Numbers begin at 1: the condition only names the number.
        added = ((number, (key, values.get(number))) for key in new if (number := self.numbers[key]))
        there = ((self.numbers[key], key) for key in revised if key in self.numbers)
        amended = ((number, (key, values.get(number))) for number, key in there if number <= kept)
        yield from self._chunks.changes(added, forgotten, amended)

    def _forget(self, limit: int) -> int:
        forgotten = 0
        while len(self._order) > limit:
            number = self.numbers.pop(self._order.popleft())
            self._values.pop(number, None)
            if self._tracks:
                self._forgotten.append(number)
            forgotten += 1
        return forgotten

    def _restore(self, rows: Rows) -> None:
        for number, (key, value) in self._chunks.restore(rows):
            self.numbers[key] = self._newest = self._kept = number
            self._order.append(key)
            if value is not None:
                self._values[number] = value
        self._forget(self.limit)  # the bound may be lower now


Early = tuple[Any, int, str, Raw, int, int]
"""A label that waits for its question: label, its time, its place in the input, the record as read, the time of the
first label for this question, and the number that this one got."""


class EarlyLabels:
    """Labels by what they name, in the order in which they came; a newer one for the same question keeps the place.

    >>> early = EarlyLabels()
    >>> early.keep("a", True, 5, "labels:1", b"")
    >>> early.keep("b", False, 6, "labels:2", b"")
    >>> early.keep("a", False, 7, "labels:3", b"")
    >>> early.first_came(), early.pop_first()[0], early.pop("b")[:2], early.first_came()
    (5, 'a', (False, 6), inf)
    """

    __slots__ = ("entries", "_chunks", "_gone", "_kept", "_newest", "_order", "_revised", "_tracks")

    def __init__(self, rows: Rows | None = None) -> None:
        self.entries: dict[Hashable, Early] = {}
        self._order: deque[tuple[int, Hashable]] = deque()
        self._newest = self._kept = 0
        self._chunks = Chunks("early")
        self._tracks = rows is not None
        self._gone: list[int] = []
        self._revised: set[Hashable] = set()
        if rows is not None:
            for number, (match, entry) in self._chunks.restore(rows):
                self.entries[match] = entry
                self._order.append((number, match))
                self._newest = self._kept = number

    def keep(self, match: Hashable, value: Any, time: int, place: str, raw: Raw) -> None:
        """Have a label wait; it replaces one that waits for the same question."""
        before = self.entries.get(match)
        if before is None:
            self._newest += 1
            self._order.append((self._newest, match))
            self.entries[match] = (value, time, place, raw, time, self._newest)
        else:
            self.entries[match] = (value, time, place, raw, before[4], before[5])
            if self._tracks:
                self._revised.add(match)

    def pop(self, match: Hashable) -> Early:
        """Take the label for a question."""
        entry = self.entries.pop(match)
        if self._tracks:
            self._gone.append(entry[5])
        self._skip_taken()
        return entry

    def pop_first(self) -> tuple[Hashable, Early]:
        """Take the label that has waited longest, with what it names."""
        match = self._order[0][1]
        return match, self.pop(match)

    def first_came(self) -> float:
        """When (event time) the label came that has waited longest; inf when none waits."""
        return self.entries[self._order[0][1]][4] if self._order else inf

    def changes(self) -> Iterator[Change]:
        """What the rows need to follow since the last call."""
        kept, self._kept = self._kept, self._newest
        gone, self._gone = self._gone, []
        revised, self._revised = self._revised, set()
        added: list[tuple[int, Any]] = []
        for number, match in reversed(self._order):
            if number <= kept:
                break
            if self._waits(number, match):
                added.append((number, (match, self.entries[match])))
        there = ((match, self.entries[match]) for match in revised if match in self.entries)
        amended = ((entry[5], (match, entry)) for match, entry in there if entry[5] <= kept)
        yield from self._chunks.changes(reversed(added), gone, amended)

    def _skip_taken(self) -> None:
        """The first in the order is always one that still waits, and not many behind it were taken."""
        order = self._order
        while order and not self._waits(*order[0]):
            order.popleft()
        if len(order) > 2 * len(self.entries) + 16:
            self._order = deque(each for each in order if self._waits(*each))

    def _waits(self, number: int, match: Hashable) -> bool:
        entry = self.entries.get(match)
        return entry is not None and entry[5] == number
