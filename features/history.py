"""Exact look-back windows, `Sliding` and `Last(n)`: the events of one entity in order of time, with running sums.

Per column of values there are prefix sums, so that a sum, mean or variance over any window is one subtraction: nothing
moves when time passes, late questions cost what prompt ones do, and reading changes nothing. Aggregates that cannot be
subtracted have a Mover per window: an accumulator and the two ends of what it has been given.

The cost of an event is O(log n) for windows of n events, plus the number of events after it where it comes late.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from features.exact import shift_for, units

TRIM_FROM = 32
"""Histories shorter than this are not trimmed."""


class Removable(Protocol):
    """An accumulator that gives back what it was given."""

    def add(self, value: Any, t: int) -> None: ...
    def remove(self, value: Any, t: int) -> None: ...
    def clear(self) -> None: ...
    def get(self) -> object: ...


class Needs(NamedTuple):
    """What is kept of a column: prefix sums, prefix sums of squares, the values themselves."""

    sums: bool
    squares: bool
    values: bool


class HistoryPlan(NamedTuple):
    """What the histories of one declaration have in common."""

    spans_us: tuple[int, ...]
    lasts: tuple[int, ...]
    ttl_us: int | None
    lateness_us: int
    columns: tuple[Needs, ...]
    movers: tuple[tuple[int, Callable[[], Removable]], ...]
    """The column and the accumulator of each aggregate that needs Movers."""


class Column:
    """One field of the events of one entity. Lists of prefixes have one element more than there are events."""

    __slots__ = ("counts", "place", "shift", "squares", "sums", "unit", "values")

    def __init__(self, place: int, needs: Needs) -> None:
        self.place = place  # of the field among the values of an event
        self.shift = 0
        self.unit = 1.0  # 2.0**shift, or inf
        self.sums: list[int] | None = [0] if needs.sums else None
        self.squares: list[int] | None = [0] if needs.squares else None
        self.values: list[Any] | None = [] if needs.values else None
        self.counts: list[int] | None = None  # of values not None; None while every value is one

    def append(self, value: Any, size: int) -> None:
        """Put `value` after the `size` values there are."""
        sums = self.sums
        if sums is not None:
            amount = self._units(value)
            sums.append(sums[-1] + amount)
            if self.squares is not None:
                self.squares.append(self.squares[-1] + amount * amount)
        if self.values is not None:
            self.values.append(value)
        if self.counts is not None:
            self.counts.append(self.counts[-1] + (value is not None))
        elif value is None:
            self.counts = [*range(size + 1), size]

    def insert(self, at: int, value: Any, size: int) -> None:
        """Put `value` before the value at `at`."""
        if value is None and self.counts is None:
            self.counts = list(range(size + 1))
        if self.counts is not None:
            _insert_prefix(self.counts, at, int(value is not None))
        if self.values is not None:
            self.values.insert(at, value)
        if self.sums is not None:
            amount = self._units(value)
            _insert_prefix(self.sums, at, amount)
            if self.squares is not None:
                _insert_prefix(self.squares, at, amount * amount)

    def drop(self, count: int) -> None:
        """Forget the first `count` values."""
        if self.values is not None:
            del self.values[:count]
        self.sums = _drop_prefix(self.sums, count)
        self.squares = _drop_prefix(self.squares, count)
        self.counts = _drop_prefix(self.counts, count)
        if self.counts is not None and self.counts[-1] == len(self.counts) - 1:
            self.counts = None

    def count(self, lo: int, hi: int) -> int:
        """How many of the values lo … hi - 1 are not None."""
        return hi - lo if self.counts is None else self.counts[hi] - self.counts[lo]

    def first(self, lo: int, hi: int) -> int:
        """The index of the first value not None among lo … hi - 1; there must be one."""
        return lo if self.counts is None else bisect_right(self.counts, self.counts[lo], lo, hi + 1) - 1

    def last(self, lo: int, hi: int) -> int:
        """The index of the last value not None among lo … hi - 1; there must be one."""
        return hi - 1 if self.counts is None else bisect_left(self.counts, self.counts[hi], lo, hi + 1) - 1

    def _units(self, value: Any) -> int:
        """The value in units of 2**-shift, 0 for None; the shift grows where it must."""
        kind = type(value)
        if kind is float:
            scaled: float = value * self.unit
            if 2.0**52 <= scaled < 2.0**1000:  # from 2**52 on, every float is whole
                return int(scaled)
        elif kind is bool or kind is int:
            whole: int = value << self.shift
            return whole
        if value is None:
            return 0
        try:
            return units(value, self.shift)
        except ValueError:  # a negative shift count: the value is finer than our units
            self._refine(shift_for(value))
            return units(value, self.shift)

    def _refine(self, shift: int) -> None:
        up = shift - self.shift
        self.shift = shift
        self.unit = 2.0**shift if shift < 1024 else float("inf")
        if self.sums is not None:
            self.sums[:] = [total << up for total in self.sums]
        if self.squares is not None:
            self.squares[:] = [total << 2 * up for total in self.squares]

    def __getstate__(self) -> tuple[Any, ...]:
        return self.place, self.shift, self.sums, self.squares, self.values, self.counts

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.place, self.shift, self.sums, self.squares, self.values, self.counts = state
        self.unit = 2.0**self.shift if self.shift < 1024 else float("inf")


class Mover:
    """An accumulator over the events lo … hi - 1 of a history; both ends go forth and back."""

    __slots__ = ("hi", "lo", "total")

    def __init__(self, total: Removable) -> None:
        self.total = total
        self.lo = self.hi = 0

    def move_to(self, lo: int, hi: int, values: list[Any], times: array[int]) -> Removable:
        """The accumulator over the events lo … hi - 1."""
        if lo >= self.hi or hi <= self.lo:
            self.total.clear()
            self.lo = self.hi = lo
        total = self.total
        for i in (*range(self.hi, hi), *range(lo, self.lo)):
            if values[i] is not None:
                total.add(values[i], times[i])
        for i in (*range(self.lo, lo), *range(hi, self.hi)):
            if values[i] is not None:
                total.remove(values[i], times[i])
        self.lo, self.hi = lo, hi
        return total

    def inserted(self, at: int, value: Any, t: int) -> None:
        """Follow an event put before the one at `at`."""
        if at < self.hi:
            self.hi += 1
            if at <= self.lo:
                self.lo += 1
            elif value is not None:
                self.total.add(value, t)

    def dropped(self, count: int, values: list[Any], times: array[int]) -> None:
        """Follow the loss of the first `count` events, which are still there."""
        self.move_to(max(self.lo, count), max(self.hi, count), values, times)
        self.lo -= count
        self.hi -= count


class History:
    """The events of one entity that windows may still ask for, by time, at equal times in order of arrival."""

    __slots__ = ("columns", "movers", "times")

    def __init__(self, plan: HistoryPlan) -> None:
        self.times: array[int] = array("q")
        self.columns = [Column(place, needs) for place, needs in enumerate(plan.columns)]
        self.movers: list[list[Mover]] | None = None

    def observe(self, plan: HistoryPlan, t: int, values: tuple[Any, ...]) -> int:
        """Put an event at its place; returns how many events are there up to and including it."""
        times = self.times
        size = len(times)
        if size and t < times[-1]:
            hi = self._insert(plan, t, values)
        else:
            for column in self.columns:
                column.append(values[column.place], size)
            times.append(t)
            hi = size + 1
        if size & (size + 1) == 0 and size + 1 >= TRIM_FROM:
            hi = max(hi - self._trim(plan), 0)
        return hi

    def bounds(self, plan: HistoryPlan, t: int, hi: int) -> list[int]:
        """Where each window as of t starts, given that the first `hi` events came at t or before."""
        times = self.times
        result = [bisect_right(times, t - span) for span in plan.spans_us]
        for count in plan.lasts:
            lo = hi - count if hi > count else 0
            result.append(lo if plan.ttl_us is None else self._since_pause(plan.ttl_us, t, lo, hi))
        return result

    def moved(self, plan: HistoryPlan, mover: int, window: int, lo: int, hi: int) -> Removable:
        """The accumulator of the `mover`-th moving aggregate over the events lo … hi - 1 of the `window`-th window."""
        if self.movers is None:
            windows = len(plan.spans_us) + len(plan.lasts)
            self.movers = [[Mover(build()) for _ in range(windows)] for _, build in plan.movers]
        values = self.columns[plan.movers[mover][0]].values
        assert values is not None
        return self.movers[mover][window].move_to(lo, hi, values, self.times)

    def _insert(self, plan: HistoryPlan, t: int, values: tuple[Any, ...]) -> int:
        size = len(self.times)
        at = bisect_right(self.times, t)
        for movers, (column, _) in zip(self.movers or (), plan.movers, strict=False):
            for mover in movers:
                mover.inserted(at, values[column], t)
        self.times.insert(at, t)
        for each in self.columns:
            each.insert(at, values[each.place], size)
        return at + 1

    def _trim(self, plan: HistoryPlan) -> int:
        """Forget what no window can ask for, if that is a quarter or more; asked at sizes 2**k, this is amortised."""
        times = self.times
        oldest = times[-1] - plan.lateness_us
        count = len(times)
        if plan.spans_us:
            count = bisect_right(times, oldest - max(plan.spans_us))
        if plan.lasts:
            count = min(count, bisect_right(times, oldest) - max(plan.lasts))
        if count < len(times) // 4:
            return 0
        for movers, (column, _) in zip(self.movers or (), plan.movers, strict=False):
            values = self.columns[column].values
            assert values is not None
            for mover in movers:
                mover.dropped(count, values, times)
        del times[:count]
        for each in self.columns:
            each.drop(count)
        return count

    def _since_pause(self, ttl_us: int, t: int, lo: int, hi: int) -> int:
        """The first of the events lo … hi - 1 after the last pause longer than the ttl."""
        times = self.times
        if lo == hi or t - times[lo] <= ttl_us:
            return lo
        later = t
        for i in range(hi - 1, lo - 1, -1):
            if later - times[i] > ttl_us:
                return i + 1
            later = times[i]
        return lo

    def __getstate__(self) -> tuple[Any, ...]:
        return self.times, self.columns

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.times, self.columns = state
        self.movers = None  # built again from the values when asked


def _insert_prefix(prefixes: list[int], at: int, amount: int) -> None:
    prefixes.insert(at + 1, prefixes[at] + amount)
    if amount:
        for i in range(at + 2, len(prefixes)):
            prefixes[i] += amount


def _drop_prefix(prefixes: list[int] | None, count: int) -> list[int] | None:
    if prefixes is None:
        return None
    base = prefixes[count]
    return [total - base for total in prefixes[count:]]
