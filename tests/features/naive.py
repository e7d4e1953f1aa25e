"""The oracle: every feature computed anew from all events, in plain rationals, as the declarations define it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from copy import deepcopy
from fractions import Fraction
from typing import Any

from features import aggregates, windows
from features.spec import Entity

Event = tuple[int, dict[str, Any]]


class NaiveFeatures:
    """Keeps every event; has the verbs of EntityFeatures."""

    def __init__(self, declaration: Entity) -> None:
        self.declaration = declaration
        self.columns = declaration.columns
        self.events: dict[Any, list[Event]] = {}

    def observe(self, key: Any, t: int, values: tuple[Any, ...]) -> None:
        events = self.events.setdefault(key, [])
        events.append((t, dict(zip(self.columns, values, strict=True))))
        events.sort(key=lambda event: event[0])  # stable: equal times stay in order of arrival

    def ask(self, key: Any, t: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        self.observe(key, t, values)
        return self._row(key, t, asking=True)

    def read(self, key: Any, t: int) -> tuple[Any, ...]:
        return self._row(key, t, asking=False)

    def _row(self, key: Any, t: int, asking: bool) -> tuple[Any, ...]:
        past = [event for event in self.events.get(key, []) if event[0] <= t]
        if self.declaration.ttl_us is not None:
            past = since_pause(past, t, self.declaration.ttl_us)
        row = []
        for aggregate in self.declaration.aggregates:
            for over in self.declaration.over:
                inside, length = select(past, t, over)
                value = compute(aggregate, inside, t, asking, length)
                row.append(aggregate.empty if value is None else value)
        return tuple(row)


def since_pause(past: list[Event], t: int, gap: int) -> list[Event]:
    """The events after the last pause longer than `gap`, as of `t`."""
    kept: list[Event] = []
    for event in reversed(past):
        if t - event[0] > gap:
            break
        t = event[0]
        kept.insert(0, event)
    return kept


def select(past: list[Event], t: int, over: Any) -> tuple[list[Event], int | None]:
    """The events in the window, and its length where it has one."""
    match over:
        case windows.Sliding():
            start, length = t - over.length_us + 1, over.length_us
        case windows.LastEvents():
            return past[-over.count :], None
        case windows.Tumbling():
            start, length = t // over.size_us * over.size_us, over.size_us
        case windows.Hopping():
            start, length = (t // over.hop_us + 1) * over.hop_us - over.size_us, over.size_us
        case windows.Session():
            return since_pause(past, t, over.gap_us), None
        case windows.Tiled():
            start = (t - over.length_us) // over.tile_us * over.tile_us
            length = t - start
        case _:
            return past, None
    return [event for event in past if event[0] >= start], length


def compute(aggregate: Any, events: list[Event], t: int, asking: bool, length: int | None) -> Any:
    """The aggregate's value; None where there is none."""
    match aggregate:
        case aggregates.Count():
            return len(events) or None
        case aggregates.TimeSince():
            before = events[:-1] if asking else events
            return (t - before[-1][0]) / 1_000_000 if before else None
        case aggregates.Rate():
            length = t - events[0][0] if events and length is None else length
            return float(Fraction(len(events) * aggregate.per_us, length)) if events and length else None
        case aggregates.River():
            stat, field = deepcopy(aggregate.stat), str(aggregate.field)
            for _, event in events:
                if event[field] is not None:
                    stat.update(event[field])
            return stat.get()
    observed = [(time, event[aggregate.field]) for time, event in events if event[aggregate.field] is not None]
    return of_values(aggregate, observed, t) if observed else None


def of_values(aggregate: Any, observed: list[tuple[int, Any]], t: int) -> Any:
    """The value of an aggregate that reads a field, of one or more values with their times."""
    values = [value for _, value in observed]
    match aggregate:
        case aggregates.First():
            return values[0]
        case aggregates.LastValue():
            return values[-1]
        case aggregates.NUnique():
            return min(len({(type(value), value) for value in values}), aggregate.limit)
        case aggregates.MostFrequent():
            counts = Counter((type(value).__name__, value) for value in values)
            return min(counts, key=lambda each: (-counts[each], each))[1]
        case aggregates.Min():
            return float(min(values))
        case aggregates.Max():
            return float(max(values))
        case aggregates.Quantile():
            return sorted(values)[int(aggregate.q * (len(values) - 1))]
        case aggregates.EWMean():
            weights = [0.5 ** ((t - time) / aggregate.halflife_us) for time, _ in observed]
            return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    return of_numbers(aggregate, [Fraction(value) for value in values])


def of_numbers(aggregate: Any, values: list[Fraction]) -> float | None:
    """Sum, Mean, Var and Std."""
    n, total = len(values), sum(values, Fraction(0))
    match aggregate:
        case aggregates.Sum():
            return nearest(total)
        case aggregates.Mean():
            return nearest(total / n)
    if n <= aggregate.ddof:
        return None
    if isinstance(aggregate, aggregates.Std):  # the standard library's is exact for fractions, rounded once
        return float(statistics.stdev(values) if aggregate.ddof else statistics.pstdev(values))
    return nearest(sum(((value - total / n) ** 2 for value in values), Fraction(0)) / (n - aggregate.ddof))


def nearest(value: Fraction) -> float:
    """The float nearest to the value; infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
