"""How each aggregate is computed: over the events of a History, and from the parts of a window that keeps none.

A Reader is built once per declaration and reads one aggregate over all windows of a history at one go; a finish takes
one part of one window. Both answer MISSING, or what the aggregate declares as `empty`, when nothing is there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from features import accumulators, aggregates
from features.aggregates import Aggregate
from features.exact import ratio, root, spread
from features.folds import TileBest, TileTotals, always, never
from features.history import History, HistoryPlan, Needs, Removable
from features.missing import MISSING
from features.sketch import Sketch

SECOND_US = 1_000_000
Finish = Callable[[Any, int, bool, int | None], object]


class Reader:
    """Appends an aggregate's values as of `t`, one for each window.

    The windows start at the events `bounds`; the first `hi` events came at `t` or before, the first `previous` before
    the one that asks.
    """

    __slots__ = ("aggregate", "column", "empty", "plan")

    def __init__(self, aggregate: Any, column: int, plan: HistoryPlan) -> None:
        self.aggregate = aggregate
        self.column = column
        self.empty = aggregate.empty
        self.plan = plan

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        """Append the values."""
        raise NotImplementedError


class CountReader(Reader):
    """Count."""

    __slots__ = ()

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        for lo in bounds:
            out.append(hi - lo if lo < hi else self.empty)  # noqa: PERF401  (a generator would cost a frame)


class MeanReader(Reader):
    """Mean, the one read most: the subtraction in place."""

    __slots__ = ()

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        column = history.columns[self.column]
        sums, counts, shift = column.sums, column.counts, column.shift
        assert sums is not None
        top = sums[hi]
        for lo in bounds:
            n = hi - lo if counts is None else counts[hi] - counts[lo]
            if n == 0:
                out.append(self.empty)
                continue
            try:
                out.append((top - sums[lo]) / (n << shift))
            except OverflowError:
                out.append(ratio(top - sums[lo], n << shift))


class MomentsReader(Reader):
    """Sum, Var and Std."""

    __slots__ = ("finish",)

    def __init__(self, aggregate: Aggregate, column: int, plan: HistoryPlan) -> None:
        super().__init__(aggregate, column, plan)
        self.finish = _MOMENTS[type(aggregate)]

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        column = history.columns[self.column]
        sums, squares = column.sums, column.squares
        assert sums is not None
        for lo in bounds:
            square = 0 if squares is None else squares[hi] - squares[lo]
            value = self.finish(self.aggregate, column.count(lo, hi), sums[hi] - sums[lo], square, column.shift)
            out.append(self.empty if value is MISSING else value)


class EndReader(Reader):
    """First and Last."""

    __slots__ = ()

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        column = history.columns[self.column]
        values = column.values
        assert values is not None
        find = column.first if isinstance(self.aggregate, aggregates.First) else column.last
        out.extend(values[find(lo, hi)] if column.count(lo, hi) else self.empty for lo in bounds)


class TimeSinceReader(Reader):
    """TimeSince."""

    __slots__ = ()

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        out.extend((t - history.times[previous - 1]) / SECOND_US if lo < previous else self.empty for lo in bounds)


class RateReader(Reader):
    """Rate."""

    __slots__ = ()

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        for lo, span_us in zip(bounds, self.plan.spans_us, strict=True):
            out.append((hi - lo) * self.aggregate.per_us / span_us if lo < hi else self.empty)


class MovingReader(Reader):
    """Aggregates that move an accumulator along: Min, Max, NUnique, MostFrequent, Quantile."""

    __slots__ = ("finish", "mover")

    def __init__(self, aggregate: Aggregate, column: int, plan: HistoryPlan, mover: int) -> None:
        super().__init__(aggregate, column, plan)
        self.mover = mover
        self.finish = finish(aggregate)

    def read(self, history: History, bounds: list[int], hi: int, previous: int, t: int, out: list[object]) -> None:
        for window, lo in enumerate(bounds):
            value = self.finish(history.moved(self.plan, self.mover, window, lo, hi), t, False, None)
            out.append(self.empty if value is MISSING else value)


_READERS: dict[type[Aggregate], type[Reader]] = {
    aggregates.Count: CountReader,
    aggregates.Mean: MeanReader,
    aggregates.Sum: MomentsReader,
    aggregates.Var: MomentsReader,
    aggregates.Std: MomentsReader,
    aggregates.First: EndReader,
    aggregates.LastValue: EndReader,
    aggregates.TimeSince: TimeSinceReader,
    aggregates.Rate: RateReader,
}


def reader(aggregate: Aggregate, column: int, plan: HistoryPlan, mover: int) -> Reader:
    """The reader of an aggregate; `column` is -1 where it reads no field, `mover` its place among the moving ones."""
    if moving(aggregate) is not None:
        return MovingReader(aggregate, column, plan, mover)
    return _READERS[type(aggregate)](aggregate, column, plan)


def needs(readers_of_column: list[Aggregate]) -> Needs:
    """What a history must keep of a column that these aggregates read."""
    return Needs(
        sums=any(type(each) in _MOMENTS for each in readers_of_column),
        squares=any(isinstance(each, aggregates.Var | aggregates.Std) for each in readers_of_column),
        values=any(type(each) not in _MOMENTS for each in readers_of_column),
    )


def moving(aggregate: Any) -> Callable[[], Removable] | None:
    """The accumulator that takes values back, for aggregates that need one to look back."""
    match aggregate:
        case aggregates.Min():
            return partial(accumulators.Heap, 1)
        case aggregates.Max():
            return partial(accumulators.Heap, -1)
        case aggregates.NUnique():
            return partial(accumulators.Distinct, None)
        case aggregates.MostFrequent():
            return partial(accumulators.Frequent, None)
        case aggregates.Quantile():
            return partial(Sketch, aggregate.q, aggregate.accuracy)
        case _:
            return None


def running(aggregate: Any) -> Callable[[], Any]:
    """The accumulator of windows that begin anew as a whole."""
    match aggregate:
        case aggregates.Min():
            return accumulators.Lowest
        case aggregates.Max():
            return accumulators.Highest
        case aggregates.First():
            return accumulators.Earliest
        case aggregates.LastValue():
            return accumulators.Latest
        case aggregates.TimeSince():
            return accumulators.Previous
        case aggregates.EWMean():
            return partial(accumulators.Decay, aggregate.halflife_us)
        case aggregates.River():
            return partial(accumulators.Wrapped, aggregate.stat)
        case _:
            return _mergeable(aggregate)


def tiled(aggregate: Any) -> Callable[[], TileTotals | TileBest]:
    """What windows of tiles keep."""
    match aggregate:
        case aggregates.Min():
            return partial(TileBest, operator.le)
        case aggregates.Max():
            return partial(TileBest, operator.ge)
        case aggregates.First():
            return partial(TileBest, never)
        case aggregates.LastValue():
            return partial(TileBest, always)
        case _:
            return partial(TileTotals, _mergeable(aggregate))


def _mergeable(aggregate: Any) -> Callable[[], Any]:
    match aggregate:
        case aggregates.Count() | aggregates.Rate():
            return accumulators.Tally
        case aggregates.Sum() | aggregates.Mean() | aggregates.Var() | aggregates.Std():
            return accumulators.Moments
        case aggregates.NUnique():
            return partial(accumulators.Distinct, aggregate.limit)
        case aggregates.MostFrequent():
            return partial(accumulators.Frequent, aggregate.limit)
        case aggregates.Quantile():
            return partial(Sketch, aggregate.q, aggregate.accuracy)
    raise TypeError(f"{aggregate!r} has no accumulator that can be merged")


def finish(aggregate: Aggregate) -> Finish:
    """How the aggregate's value follows from its part of a window (see `folds.Result`)."""
    if type(aggregate) in _MOMENTS:
        return partial(_finish_moments, aggregate, _MOMENTS[type(aggregate)])
    return partial(_FINISHES.get(type(aggregate), _finish_got), aggregate)


def _finish_moments(aggregate: Any, compute: _Moment, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    return compute(aggregate, part.n, part.total, part.squares, part.shift)


def _finish_count(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    return part.n or MISSING


def _finish_rate(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    if part.n == 0:
        return MISSING
    length_us = t - part.first if length_us is None else length_us
    return part.n * aggregate.per_us / length_us if length_us else MISSING


def _finish_time_since(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    previous = part.before if asking else part.last
    return MISSING if previous is None else (t - previous) / SECOND_US


def _finish_number(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    value = part.get()
    return MISSING if value is MISSING else value + 0.0  # a float, and never -0.0


def _finish_limited(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    value = part.get()
    return MISSING if value is MISSING else min(value, aggregate.limit)


def _finish_got(aggregate: Any, part: Any, t: int, asking: bool, length_us: int | None) -> object:
    return part.get()


_FINISHES: dict[type[Aggregate], Callable[..., object]] = {
    aggregates.Count: _finish_count,
    aggregates.Rate: _finish_rate,
    aggregates.TimeSince: _finish_time_since,
    aggregates.Min: _finish_number,
    aggregates.Max: _finish_number,
    aggregates.NUnique: _finish_limited,
}


def _sum(aggregate: Any, n: int, total: int, squares: int, shift: int) -> object:
    return ratio(total, 1 << shift) if n else MISSING


def _mean(aggregate: Any, n: int, total: int, squares: int, shift: int) -> object:
    return ratio(total, n << shift) if n else MISSING


def _var(aggregate: Any, n: int, total: int, squares: int, shift: int) -> object:
    return ratio(*spread(n, total, squares, aggregate.ddof, shift)) if n > aggregate.ddof else MISSING


def _std(aggregate: Any, n: int, total: int, squares: int, shift: int) -> object:
    return root(*spread(n, total, squares, aggregate.ddof, shift)) if n > aggregate.ddof else MISSING


_Moment = Callable[[Any, int, int, int, int], object]
_MOMENTS: dict[type[Aggregate], _Moment] = {
    aggregates.Sum: _sum,
    aggregates.Mean: _mean,
    aggregates.Var: _var,
    aggregates.Std: _std,
}
