"""Windows that keep no events: `Lifetime`, `Tumbling`, `Session` (Running) and `Hopping`, `Tiled` (Tiles).

Here time only goes forward: what comes at an earlier time than the newest counts as if at the newest. Where events may
come late, `Folds` keeps what is needed to answer as if they had not.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from features.accumulators import Latest
from features.missing import MISSING
from features.windows import Hopping, Tiled, Tumbling, Window

Values = tuple[Any, ...]


class Mergeable(Protocol):
    """An accumulator to which others can be added and taken away again."""

    def add(self, value: Any, t: int) -> None: ...
    def takes(self, value: Any) -> bool: ...
    def blank(self) -> Any: ...
    def merge(self, other: Any) -> None: ...
    def subtract(self, other: Any) -> None: ...


class Result(NamedTuple):
    """A feature of a window: which of the window's parts it reads, and how.

    `finish(part, t, asking, length_us)` gives the value or MISSING, which stands for `empty`. `asking`: the last event
    is the one that asks. `length_us`: the window's length, None for windows that start at their first event.
    """

    part: int
    finish: Callable[[Any, int, bool, int | None], object]
    empty: object


class FoldPlan(NamedTuple):
    """What the states of one window have in common."""

    window: Window
    gap_us: int | None
    """How long a pause empties the window; None: none does."""
    parts: tuple[tuple[int | None, Callable[[], Any]], ...]
    """Each accumulator's column (None: it is fed the event) and builder."""
    results: tuple[Result, ...]
    fresh: tuple[Any, ...]
    """The parts of a window in which nothing has come. Not to be fed."""

    def build(self) -> Running | Tiles:
        """The window's state for an entity just seen."""
        return Tiles(self) if isinstance(self.window, Hopping | Tiled) else Running(self)


class Running:
    """One accumulator per part, begun anew where a new window begins."""

    __slots__ = ("last", "parts")

    def __init__(self, plan: FoldPlan) -> None:
        self.last: int | None = None
        self.parts: tuple[Any, ...] = tuple(build() for _, build in plan.parts)

    def observe(self, plan: FoldPlan, t: int, values: Values) -> None:
        """Feed an event."""
        last = self.last
        if last is not None:
            if t < last:
                t = last
            elif self._parted(plan, last, t):
                self.parts = tuple(build() for _, build in plan.parts)
        self.last = t
        for (column, _), part in zip(plan.parts, self.parts, strict=True):
            if column is None:
                part.add(None, t)
            elif values[column] is not None:
                part.add(values[column], t)

    def read(self, plan: FoldPlan, t: int, asking: bool, out: list[object]) -> None:
        """Append the window's results as of `t`."""
        parts = self.parts
        last = self.last
        if last is not None and t < last:
            t = last
        elif last is None or self._parted(plan, last, t):
            parts = plan.fresh
        window = plan.window
        length_us = window.size_us if isinstance(window, Tumbling) else None
        for part, finish, empty in plan.results:
            value = finish(parts[part], t, asking, length_us)
            out.append(empty if value is MISSING else value)

    def _parted(self, plan: FoldPlan, last: int, t: int) -> bool:
        """Whether a window begins after `last` and at `t` or before."""
        if plan.gap_us is not None and t - last > plan.gap_us:
            return True
        window = plan.window
        return isinstance(window, Tumbling) and t // window.size_us != last // window.size_us

    def __getstate__(self) -> tuple[Any, ...]:
        return self.last, self.parts

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.last, self.parts = state


class Tiles:
    """The events by tile of time; a window is the tiles from its first to the newest."""

    __slots__ = ("last", "parts", "starts")

    def __init__(self, plan: FoldPlan) -> None:
        self.last: int | None = None
        self.starts: list[int] = []
        self.parts: tuple[Any, ...] = tuple(build() for _, build in plan.parts)

    def observe(self, plan: FoldPlan, t: int, values: Values) -> None:
        """Feed an event."""
        if self.last is not None and t < self.last:
            t = self.last
        self.last = t
        tile_us = plan.window.tile_us  # type: ignore[attr-defined]
        tile = t - t % tile_us
        if not self.starts or tile > self.starts[-1]:
            self._open(tile, _window_start(plan.window, t))
        for (column, _), part in zip(plan.parts, self.parts, strict=True):
            if column is None:
                part.add(None, t, tile)
            elif values[column] is not None:
                part.add(values[column], t, tile)

    def read(self, plan: FoldPlan, t: int, asking: bool, out: list[object]) -> None:
        """Append the window's results as of `t`."""
        if self.last is not None and t < self.last:
            t = self.last
        window = plan.window
        start = _window_start(window, t)
        first = bisect_left(self.starts, start)
        length_us = window.size_us if isinstance(window, Hopping) else t - start
        for part, finish, empty in plan.results:
            value = finish(self.parts[part].since(start, first), t, asking, length_us)
            out.append(empty if value is MISSING else value)

    def _open(self, tile: int, oldest: int) -> None:
        count = bisect_left(self.starts, oldest)
        del self.starts[:count]
        self.starts.append(tile)
        for part in self.parts:
            part.open(count, oldest)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.last, self.starts, self.parts

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.last, self.starts, self.parts = state


class TileTotals:
    """An accumulator per tile and a total over the tiles from `_first` on; that end goes forth and back."""

    __slots__ = ("_build", "_first", "_tiles", "_total")

    def __init__(self, build: Callable[[], Mergeable]) -> None:
        self._build = build
        self._tiles: list[Mergeable] = []
        self._first = 0
        self._total: Mergeable = build().blank()

    def open(self, count: int, oldest: int) -> None:
        """Begin a tile and drop the `count` oldest."""
        if self._first < count:
            self.since(oldest, count)
        del self._tiles[:count]
        self._first -= count
        self._tiles.append(self._build())

    def add(self, value: Any, t: int, tile: int) -> None:
        """Feed the newest tile."""
        newest = self._tiles[-1]
        if newest.takes(value):
            newest.add(value, t)
            if self._first < len(self._tiles):
                self._total.add(value, t)

    def since(self, start: int, first: int) -> Mergeable:
        """The total over the tiles from the `first`-th on."""
        total, tiles = self._total, self._tiles
        for i in range(self._first, first):
            total.subtract(tiles[i])
        for i in range(first, self._first):
            total.merge(tiles[i])
        self._first = first
        return total

    def __getstate__(self) -> tuple[Any, ...]:
        return self._build, self._tiles

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._build, self._tiles = state
        self._first = len(self._tiles)  # the total is built again when asked
        self._total = self._build().blank()


class TileBest:
    """The first, last, smallest or largest value since any tile: those values that are it since some tile.

    A value stays only as long as no later one `beats` it, so the answer since a tile is the first value from it on.
    """

    __slots__ = ("_beats", "_starts", "_values")

    def __init__(self, beats: Callable[[Any, Any], bool]) -> None:
        self._beats = beats
        self._starts: list[int] = []
        self._values: list[Any] = []

    def open(self, count: int, oldest: int) -> None:
        """Drop what came before `oldest`."""
        count = bisect_left(self._starts, oldest)
        del self._starts[:count]
        del self._values[:count]

    def add(self, value: Any, t: int, tile: int) -> None:
        """Feed the newest tile, which starts at `tile`."""
        starts, values = self._starts, self._values
        while values and self._beats(value, values[-1]):
            del starts[-1], values[-1]
        if not starts or starts[-1] < tile:
            starts.append(tile)
            values.append(value)

    def since(self, start: int, first: int) -> Latest:
        """The value since the tile that starts at `start`."""
        best = Latest()
        i = bisect_left(self._starts, start)
        if i < len(self._values):
            best.value = self._values[i]
        return best

    def __getstate__(self) -> tuple[Any, ...]:
        return self._beats, self._starts, self._values

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._beats, self._starts, self._values = state


def never(value: object, other: object) -> bool:
    """What makes TileBest keep the first value."""
    return False


def always(value: object, other: object) -> bool:
    """What makes TileBest keep the last value."""
    return True


class Folds:
    """The windows of one entity that keep no events.

    With an allowed lateness there are two of each: `current`, and `settled`, which lacks the events so recent that
    something may still come before them. Those are in `recent`; replayed onto a copy of `settled`, they give the
    windows as of any moment that may still be asked for.
    """

    __slots__ = ("current", "recent", "settled")

    def __init__(self, plans: tuple[FoldPlan, ...], lateness_us: int) -> None:
        self.current = [plan.build() for plan in plans]
        self.settled = [plan.build() for plan in plans] if lateness_us else None
        self.recent: list[tuple[int, Values]] = []

    def observe(self, plans: tuple[FoldPlan, ...], lateness_us: int, t: int, values: Values) -> None:
        """Feed an event."""
        if self.settled is None:
            _feed(plans, self.current, t, values)
            return
        recent = self.recent
        if not recent or t >= recent[-1][0]:
            recent.append((t, values))
            _feed(plans, self.current, t, values)
        else:
            recent.insert(bisect_right(recent, t, key=_time), (t, values))
            self.current = self._as_of(plans, recent[-1][0])
        self._settle(plans, recent[-1][0] - lateness_us)

    def read(self, plans: tuple[FoldPlan, ...], t: int, asking: bool, out: list[object]) -> None:
        """Append all windows' results as of `t`."""
        states = self.current
        if self.recent and t < self.recent[-1][0]:
            states = self._as_of(plans, t)
        for plan, state in zip(plans, states, strict=True):
            state.read(plan, t, asking, out)

    def _as_of(self, plans: tuple[FoldPlan, ...], t: int) -> list[Running | Tiles]:
        states: list[Running | Tiles] = pickle.loads(pickle.dumps(self.settled, pickle.HIGHEST_PROTOCOL))
        for time, values in self.recent:
            if time > t:
                break
            _feed(plans, states, time, values)
        return states

    def _settle(self, plans: tuple[FoldPlan, ...], before: int) -> None:
        recent = self.recent
        if recent[0][0] >= before:
            return
        assert self.settled is not None
        count = bisect_left(recent, before, key=_time)
        for t, values in recent[:count]:
            _feed(plans, self.settled, t, values)
        del recent[:count]

    def __getstate__(self) -> tuple[Any, ...]:
        return self.current, self.settled, self.recent

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.current, self.settled, self.recent = state


def _feed(plans: tuple[FoldPlan, ...], states: list[Running | Tiles], t: int, values: Values) -> None:
    for plan, state in zip(plans, states, strict=True):
        state.observe(plan, t, values)


def _time(event: tuple[int, Values]) -> int:
    return event[0]


def _window_start(window: Window, t: int) -> int:
    if isinstance(window, Hopping):
        return (t // window.hop_us + 1) * window.hop_us - window.size_us
    assert isinstance(window, Tiled)
    start = t - window.length_us
    return start - start % window.tile_us
