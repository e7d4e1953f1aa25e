"""What windows that keep no events keep instead: an accumulator per aggregate, fed one value at a time.

All have `add(value, t)`. Those that windows of events or tiles use also take back what they were given: one value
(`remove`, `clear`) or all of another's (`merge`, `subtract`). Results depend on the values only, not on how they came.
"""

from __future__ import annotations

from copy import deepcopy
from heapq import heapify, heappop, heappush
from typing import Any

from river.stats.base import Univariate

from features.exact import shift_for, units
from features.missing import MISSING


class Tally:
    """The number of events, and when the first was."""

    __slots__ = ("first", "n")

    def __init__(self) -> None:
        self.n = 0
        self.first: int | None = None

    def add(self, value: object, t: int) -> None:
        self.n += 1
        if self.first is None:
            self.first = t

    def blank(self) -> Tally:
        return Tally()

    def takes(self, value: object) -> bool:
        return True

    def merge(self, other: Tally) -> None:
        self.n += other.n

    def subtract(self, other: Tally) -> None:
        self.n -= other.n


class Moments:
    """Number, sum and sum of squares, exact: in units of 2**-shift and 2**-2·shift."""

    __slots__ = ("n", "shift", "squares", "total")

    def __init__(self) -> None:
        self.n = self.total = self.squares = self.shift = 0

    def add(self, value: float, t: int) -> None:
        try:
            amount = units(value, self.shift)
        except ValueError:  # a negative shift count: the value is finer than our units
            self._refine(shift_for(value))
            amount = units(value, self.shift)
        self.n += 1
        self.total += amount
        self.squares += amount * amount

    def blank(self) -> Moments:
        return Moments()

    def takes(self, value: float) -> bool:
        return True

    def merge(self, other: Moments) -> None:
        self._combine(other, 1)

    def subtract(self, other: Moments) -> None:
        self._combine(other, -1)

    def _combine(self, other: Moments, sign: int) -> None:
        if other.shift > self.shift:
            self._refine(other.shift)
        up = self.shift - other.shift
        self.n += sign * other.n
        self.total += sign * other.total << up
        self.squares += sign * other.squares << 2 * up

    def _refine(self, shift: int) -> None:
        up = shift - self.shift
        self.total <<= up
        self.squares <<= 2 * up
        self.shift = shift


class Lowest:
    """The smallest value."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: object = MISSING

    def add(self, value: float, t: int) -> None:
        if self.value is MISSING or value < self.value:  # type: ignore[operator]
            self.value = value

    def get(self) -> object:
        return self.value


class Highest(Lowest):
    """The largest value."""

    __slots__ = ()

    def add(self, value: float, t: int) -> None:
        if self.value is MISSING or value > self.value:  # type: ignore[operator]
            self.value = value


class Earliest:
    """The value that came first."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: object = MISSING

    def add(self, value: object, t: int) -> None:
        if self.value is MISSING:
            self.value = value

    def get(self) -> object:
        return self.value


class Latest(Earliest):
    """The value that came last."""

    __slots__ = ()

    def add(self, value: object, t: int) -> None:
        self.value = value


class Heap:
    """The smallest (sign 1) or largest (sign -1) of values that come and go: a heap with lazy deletion.

    A removed value stays in the heap until it reaches the top, or until such garbage outweighs what is live.
    """

    __slots__ = ("_counts", "_heap", "_sign")

    def __init__(self, sign: int) -> None:
        self._sign = sign
        self._heap: list[float] = []
        self._counts: dict[float, int] = {}

    def add(self, value: float, t: int) -> None:
        value = value * self._sign
        count = self._counts.get(value, 0)
        self._counts[value] = count + 1
        if count == 0:
            heappush(self._heap, value)

    def remove(self, value: float, t: int) -> None:
        value = value * self._sign
        count = self._counts[value]
        if count > 1:
            self._counts[value] = count - 1
            return
        del self._counts[value]
        if len(self._heap) > 2 * len(self._counts) + 16:
            self._heap = list(self._counts)
            heapify(self._heap)

    def clear(self) -> None:
        self._counts.clear()
        self._heap.clear()

    def get(self) -> object:
        heap, counts = self._heap, self._counts
        while heap and heap[0] not in counts:
            heappop(heap)
        return heap[0] * self._sign if heap else MISSING


def identity(value: Any) -> Any:
    """What makes a value distinct: its type and itself, so that 1, 1.0 and True are three values.

    >>> identity("a"), identity(1), identity(True), identity(0.0) == identity(-0.0)
    ('a', 1, ('bool', True), True)
    """
    kind = type(value)
    return value if kind is str or kind is int else (kind.__name__, value)


class Distinct:
    """Counts of distinct values, to tell how many there are. A full one takes no further values (limit None: never).

    With no more than `limit` kept per tile, min(number kept, limit) is exact over any number of tiles.
    """

    __slots__ = ("counts", "limit")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.counts: dict[Any, int] = {}

    def add(self, value: Any, t: int) -> None:
        self._change(identity(value), 1)

    def remove(self, value: Any, t: int) -> None:
        self._change(identity(value), -1)

    def takes(self, value: Any) -> bool:
        """Whether `add` would count this value, rather than leave it out because it is full."""
        return self.limit is None or len(self.counts) < self.limit or identity(value) in self.counts

    def blank(self) -> Distinct:
        return type(self)(None)

    def merge(self, other: Distinct) -> None:
        for key, count in other.counts.items():
            self._change(key, count)

    def subtract(self, other: Distinct) -> None:
        for key, count in other.counts.items():
            self._change(key, -count)

    def clear(self) -> None:
        self.counts.clear()

    def get(self) -> object:
        return len(self.counts) or MISSING

    def _change(self, key: Any, by: int) -> None:
        counts = self.counts
        count = counts.get(key)
        if count is None:
            if self.limit is None or len(counts) < self.limit:
                counts[key] = by
        elif count + by:
            counts[key] = count + by
        else:
            del counts[key]


_SORTABLE = (str, int, float, bool, bytes)


class Frequent(Distinct):
    """Counts of distinct values, to tell the most frequent, with a lazy heap that saves searching them.

    >>> frequent = Frequent(None)
    >>> for city in ("Toulouse", "Paris", "Paris", "Albi", "Albi"):
    ...     frequent.add(city, 0)
    >>> frequent.get()
    'Albi'
    """

    __slots__ = ("_heap",)

    def __init__(self, limit: int | None) -> None:
        super().__init__(limit)
        self._heap: list[tuple[int, str, Any, Any]] = []

    def clear(self) -> None:
        super().clear()
        self._heap.clear()

    def get(self) -> object:
        heap, counts = self._heap, self.counts
        while heap and counts.get(heap[0][3]) != -heap[0][0]:
            heappop(heap)
        if not heap:
            return MISSING
        key = heap[0][3]
        return key[1] if type(key) is tuple else key

    def _change(self, key: Any, by: int) -> None:
        super()._change(key, by)
        if key not in self.counts:
            return
        if len(self._heap) > 2 * len(self.counts) + 16:
            self._heap = [self._entry(key) for key in self.counts]
            heapify(self._heap)
        else:
            heappush(self._heap, self._entry(key))

    def _entry(self, key: Any) -> tuple[int, str, Any, Any]:
        value = key[1] if type(key) is tuple else key
        sortable = value if type(value) in _SORTABLE else repr(value)
        return -self.counts[key], type(value).__name__, sortable, key


class Decay:
    """A mean whose weights halve with every `halflife_us`."""

    __slots__ = ("_halflife_us", "_t", "_total", "_weight")

    def __init__(self, halflife_us: int) -> None:
        self._halflife_us = halflife_us
        self._t = 0
        self._total = self._weight = 0.0

    def add(self, value: float, t: int) -> None:
        fade = 0.5 ** ((t - self._t) / self._halflife_us) if self._weight else 0.0
        self._total = self._total * fade + value
        self._weight = self._weight * fade + 1.0
        self._t = t

    def get(self) -> object:
        return self._total / self._weight if self._weight else MISSING


class Previous:
    """The times of the last event and of the one before it."""

    __slots__ = ("before", "last")

    def __init__(self) -> None:
        self.before: int | None = None
        self.last: int | None = None

    def add(self, value: object, t: int) -> None:
        self.before, self.last = self.last, t


class Wrapped:
    """A statistic of river, an own copy."""

    __slots__ = ("_stat",)

    def __init__(self, stat: Univariate) -> None:
        self._stat = deepcopy(stat)

    def add(self, value: float, t: int) -> None:
        self._stat.update(value)

    def get(self) -> object:
        return self._stat.get()
