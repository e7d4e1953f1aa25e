"""The windows aggregates run over, and which aggregate works over which window.

All windows are as of a moment t of event time and end there, t included: nothing later is ever seen.

    Sliding("7d")                   (t - 7d, t], exact: keeps the events of 7 days
    Last(10)                        the last 10 events, exact: keeps 10 events
    Tumbling("1h")                  the fixed hour [k·1h, (k + 1)·1h) that holds t, so far
    Hopping("1h", hop="5m")         of the fixed hours that start every 5 minutes and hold t, the one closing first
    Session(gap="30m")              since the last pause of more than 30 minutes
    Tiled("30d", resolution="1h")   between 30d and 30d + 1h back: from the start of the hour that holds t - 30d
    Lifetime()                      everything since the entity was first seen (or came back after its ttl)

The first two keep events; the others keep accumulators only, for Hopping and Tiled one per tile.

What works over what; `late` says what becomes of an event or a question out of order, within the allowed lateness:

    | aggregate    | Sliding | Last | Tumbling | Hopping | Session | Tiled | Lifetime | late     |
    |--------------|---------|------|----------|---------|---------|-------|----------|----------|
    | Count        | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Sum          | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Mean         | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Var          | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Std          | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Min          | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Max          | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | First        | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Last         | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | NUnique      | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | MostFrequent | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | Quantile     | yes     | yes  | yes      | yes     | yes     | yes   | yes      | exact    |
    | TimeSince    | yes     | no   | yes      | no      | yes     | no    | yes      | exact    |
    | Rate         | yes     | no   | yes      | yes     | yes     | yes   | yes      | exact    |
    | EWMean       | no      | no   | no       | no      | no      | no    | yes      | replayed |
    | River        | no      | no   | no       | no      | no      | no    | yes      | replayed |

"exact": the result is that of the same events in order. "replayed": likewise, because the events within the allowed
lateness are kept and fed again in order. (Events at equal times count in their order of arrival everywhere.)
An event older than the allowed lateness should have been rejected before it comes here. If one comes, windows that
keep events put it at its place as far as they still reach; the others count it at the earliest time still open.
"""

from __future__ import annotations

from datetime import timedelta
from math import gcd
from typing import Any

from pydantic import model_validator

from features.aggregates import Aggregate, EWMean, Rate, River, TimeSince
from features.declaration import Declaration
from features.durations import duration, duration_text

Duration = str | int | timedelta
TILES_MAX = 100_000
"""The most tiles one window may be cut into."""


class Window(Declaration):
    """What every window has: its part of the feature's name, and how far back it can reach."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    @property
    def label(self) -> str:
        """The window's part of the feature's name: `7d` of `amount_mean_7d_by_card_id`; "" for none."""
        raise NotImplementedError

    @property
    def reach_us(self) -> int | None:
        """How long after its last event an entity can still be told from one never seen; None: for ever."""
        raise NotImplementedError


class Sliding(Window):
    """The exact look-back (t - length, t].

    >>> Sliding("7d").label
    '7d'
    """

    length_us: int

    def __init__(self, length: Duration) -> None:
        super().__init__(length_us=_positive("length", length))

    @property
    def label(self) -> str:
        return duration_text(self.length_us)

    @property
    def reach_us(self) -> int | None:
        return self.length_us


class LastEvents(Window):
    """The last `count` events. Written `Last(10)` in `over=`.

    >>> LastEvents(10).label
    'last_10'
    """

    count: int

    def __init__(self, count: int) -> None:
        super().__init__(count=count)

    @model_validator(mode="after")
    def _some(self) -> LastEvents:
        if self.count < 1:
            raise ValueError(f"Last needs at least one event: {self.count}. Try Last(10)")
        return self

    @property
    def label(self) -> str:
        return f"last_{self.count}"

    @property
    def reach_us(self) -> int | None:
        return None


class Tumbling(Window):
    """The fixed window [k·size, (k + 1)·size) that holds t, from its start up to t. k = 0 starts in 1970, UTC.

    >>> Tumbling("1h").label
    'tumbling_1h'
    """

    size_us: int

    def __init__(self, size: Duration) -> None:
        super().__init__(size_us=_positive("size", size))

    @property
    def label(self) -> str:
        return f"tumbling_{duration_text(self.size_us)}"

    @property
    def reach_us(self) -> int | None:
        return self.size_us


class Hopping(Window):
    """Of the windows of `size` that start every `hop` and hold t, the one that closes first, up to t.

    It starts at (t // hop + 1)·hop - size.

    >>> Hopping("1h", hop="5m").label
    'hopping_1h_5m'
    """

    size_us: int
    hop_us: int

    def __init__(self, size: Duration, hop: Duration) -> None:
        super().__init__(size_us=_positive("size", size), hop_us=_positive("hop", hop))

    @model_validator(mode="after")
    def _overlapping(self) -> Hopping:
        if self.hop_us > self.size_us:
            raise ValueError(f"hop is longer than size in {self!r}: events between the windows would be lost")
        _bound_tiles(self, self.size_us, self.tile_us)
        return self

    @property
    def tile_us(self) -> int:
        """The length of the tiles that every such window is made of."""
        return gcd(self.size_us, self.hop_us)

    @property
    def label(self) -> str:
        return f"hopping_{duration_text(self.size_us)}_{duration_text(self.hop_us)}"

    @property
    def reach_us(self) -> int | None:
        return self.size_us


class Session(Window):
    """The events since the last pause longer than `gap`; empty once such a pause has passed since the last event.

    >>> Session(gap="30m").label
    'session_30m'
    """

    gap_us: int

    def __init__(self, gap: Duration) -> None:
        super().__init__(gap_us=_positive("gap", gap))

    @property
    def label(self) -> str:
        return f"session_{duration_text(self.gap_us)}"

    @property
    def reach_us(self) -> int | None:
        return self.gap_us


class Tiled(Window):
    """A look-back of `length` rounded up to whole tiles: between length and length + resolution back from t.

    It starts where the tile that holds t - length does. It keeps length / resolution + 2 tiles at most and no events.

    >>> Tiled("30d", resolution="1h").label
    'tiled_30d_1h'
    """

    length_us: int
    tile_us: int

    def __init__(self, length: Duration, resolution: Duration) -> None:
        super().__init__(length_us=_positive("length", length), tile_us=_positive("resolution", resolution))

    @model_validator(mode="after")
    def _coarse(self) -> Tiled:
        if self.tile_us > self.length_us:
            raise ValueError(f"resolution is longer than length in {self!r}. Hint: Tumbling() is a window of one tile")
        _bound_tiles(self, self.length_us, self.tile_us)
        return self

    @property
    def label(self) -> str:
        return f"tiled_{duration_text(self.length_us)}_{duration_text(self.tile_us)}"

    @property
    def reach_us(self) -> int | None:
        return self.length_us + self.tile_us


class Lifetime(Window):
    """Everything since the entity was first seen, or came back after its ttl. "lifetime" for short.

    >>> Lifetime().label
    ''
    """

    @property
    def label(self) -> str:
        return ""

    @property
    def reach_us(self) -> int | None:
        return None


def refusal(aggregate: Aggregate, window: Window) -> str | None:
    """Why this aggregate does not work over this window, with a hint; None if it does. See the module's table.

    >>> refusal(TimeSince(), LastEvents(10))
    'the previous event is the same for any number of events. Hint: over=Lifetime()'
    """
    if isinstance(aggregate, EWMean) and not isinstance(window, Lifetime):
        return "its weights fade by themselves, a window would cut them off. Hint: over=Lifetime(), set halflife"
    if isinstance(aggregate, River) and not isinstance(window, Lifetime):
        return "river's statistics take no value back. Hint: over=Lifetime(), or one of Sum, Mean, Var, Quantile …"
    if isinstance(aggregate, TimeSince):
        if isinstance(window, LastEvents):
            return "the previous event is the same for any number of events. Hint: over=Lifetime()"
        if isinstance(window, Hopping | Tiled):
            return "tiles do not keep the time of every event. Hint: over=Lifetime() costs as little"
    if isinstance(aggregate, Rate) and isinstance(window, LastEvents):
        return "a number of events has no length of time. Hint: over=Sliding(…), or TimeSince()"
    return None


def _positive(name: str, value: Duration) -> int:
    us = duration(value)
    if us == 0:
        raise ValueError(f"{name} of a window must be longer than nothing: {value!r}. Try {name}='1h'")
    return us


def _bound_tiles(window: Window, length_us: int, tile_us: int) -> None:
    if length_us // tile_us > TILES_MAX:
        raise ValueError(
            f"{window!r} takes {length_us // tile_us:,} tiles, more than {TILES_MAX:,}. Hint: coarser tiles"
        )
