"""The aggregates an Entity can ask for: Count, Sum, Mean, Var, Std, Min, Max, First, Last, NUnique, EWMean, Quantile,
TimeSince, Rate, MostFrequent, and any univariate statistic of river.

A field that is None in an event is not observed by the aggregates of that field; Count and Rate count events all the
same. Numeric aggregates take int, float, Decimal and bool (as 0 and 1), refuse NaN and infinities, and answer floats.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

from pydantic import field_validator
from river.stats.base import Univariate

from features.declaration import Declaration
from features.durations import duration, duration_text


class Aggregate(Declaration):
    """What every aggregate has: the field it reads, if any, and the value when there is nothing in its window."""

    field: str | None = None
    empty: Any = None

    reads: ClassVar[str] = "anything"
    """What values the field may have: "numbers", "hashables" or "anything"."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    @field_validator("field")
    @classmethod
    def _named(cls, field: str | None) -> str | None:
        if field is not None and not field:
            raise ValueError(f"{cls.__name__} needs the name of a field, not ''")
        return field

    @property
    def stem(self) -> str:
        """The aggregate's part of the feature's name: `amount_mean` of `amount_mean_7d_by_card_id`."""
        return f"{self.field}_{type(self).__name__.lower()}"


class Count(Aggregate):
    """The number of events.

    >>> Count().stem
    'count'
    """

    def __init__(self, *, empty: Any = 0) -> None:
        super().__init__(empty=empty)

    @property
    def stem(self) -> str:
        return "count"


class Sum(Aggregate):
    """The sum of a field, computed exactly and rounded once.

    >>> Sum("amount").stem
    'amount_sum'
    """

    reads = "numbers"

    def __init__(self, field: str, *, empty: Any = 0.0) -> None:
        super().__init__(field=field, empty=empty)


class Mean(Aggregate):
    """The mean of a field, computed exactly and rounded once.

    >>> Mean("amount").stem
    'amount_mean'
    """

    reads = "numbers"

    def __init__(self, field: str, *, empty: Any = 0.0) -> None:
        super().__init__(field=field, empty=empty)


class _Spread(Aggregate):
    ddof: int = 1
    reads = "numbers"

    @field_validator("ddof")
    @classmethod
    def _not_negative(cls, ddof: int) -> int:
        if ddof < 0:
            raise ValueError(f"ddof cannot be negative: {ddof}. 1 gives the sample's variance, 0 the population's")
        return ddof

    @property
    def stem(self) -> str:
        return super().stem if self.ddof == 1 else f"{super().stem}_ddof{self.ddof}"


class Var(_Spread):
    """The variance of a field, (n·Σx² - (Σx)²) / (n·(n - ddof)), computed exactly and rounded once.

    Empty while there are no more than `ddof` values.

    >>> Var("amount").stem, Var("amount", ddof=0).stem
    ('amount_var', 'amount_var_ddof0')
    """

    def __init__(self, field: str, ddof: int = 1, *, empty: Any = 0.0) -> None:
        super().__init__(field=field, ddof=ddof, empty=empty)


class Std(_Spread):
    """The standard deviation of a field: the root of `Var`, rounded once.

    >>> Std("amount").stem
    'amount_std'
    """

    def __init__(self, field: str, ddof: int = 1, *, empty: Any = 0.0) -> None:
        super().__init__(field=field, ddof=ddof, empty=empty)


class Min(Aggregate):
    """The smallest value of a field.

    >>> Min("amount").stem
    'amount_min'
    """

    reads = "numbers"

    def __init__(self, field: str, *, empty: Any = None) -> None:
        super().__init__(field=field, empty=empty)


class Max(Aggregate):
    """The largest value of a field.

    >>> Max("amount").stem
    'amount_max'
    """

    reads = "numbers"

    def __init__(self, field: str, *, empty: Any = None) -> None:
        super().__init__(field=field, empty=empty)


class First(Aggregate):
    """The earliest value of a field in the window, of any type.

    >>> First("city").stem
    'city_first'
    """

    def __init__(self, field: str, *, empty: Any = None) -> None:
        super().__init__(field=field, empty=empty)


class LastValue(Aggregate):
    """The latest value of a field in the window, of any type. Written `Last("city")`.

    >>> LastValue("city").stem
    'city_last'
    """

    def __init__(self, field: str, *, empty: Any = None) -> None:
        super().__init__(field=field, empty=empty)

    @property
    def stem(self) -> str:
        return f"{self.field}_last"


class _Limited(Aggregate):
    limit: int = 10_000
    reads = "hashables"

    @field_validator("limit")
    @classmethod
    def _positive(cls, limit: int) -> int:
        if limit < 1:
            raise ValueError(f"limit must be at least 1: {limit}. It bounds the number of distinct values kept")
        return limit


class NUnique(_Limited):
    """The number of distinct values of a field, exact up to `limit` and `limit` from there on.

    Values of different types are different: 1, 1.0 and True are three.

    >>> NUnique("terminal_id").stem
    'terminal_id_nunique'
    """

    def __init__(self, field: str, limit: int = 10_000, *, empty: Any = 0) -> None:
        super().__init__(field=field, limit=limit, empty=empty)


class MostFrequent(_Limited):
    """The most frequent value of a field; of several the smallest by type name, then value.

    Windows that keep no events count the first `limit` distinct values (per tile, where there are tiles) and leave
    out any further one. Values of different types are different: 1, 1.0 and True are three.

    >>> MostFrequent("merchant").stem
    'merchant_most_frequent'
    """

    def __init__(self, field: str, limit: int = 10_000, *, empty: Any = None) -> None:
        super().__init__(field=field, limit=limit, empty=empty)

    @property
    def stem(self) -> str:
        return f"{self.field}_most_frequent"


class EWMean(Aggregate):
    """The mean with weights that halve with every `halflife` (a duration) of event time. Over Lifetime() only.

    Computed in floats as it goes: the last bits depend on the order of the events, which is the order of event time.

    >>> EWMean("amount", halflife="1d").stem
    'amount_ewmean_1d'
    """

    halflife_us: int
    reads = "numbers"

    def __init__(self, field: str, halflife: str | int | timedelta = "1d", *, empty: Any = None) -> None:
        super().__init__(field=field, halflife_us=_positive_duration("halflife", halflife), empty=empty)

    @property
    def stem(self) -> str:
        return f"{self.field}_ewmean_{duration_text(self.halflife_us)}"


class Quantile(Aggregate):
    """The value at rank ⌊q·(n - 1)⌋ from below, within a relative error of `accuracy` (DDSketch).

    >>> Quantile("amount", q=0.95).stem
    'amount_q95'
    """

    q: float = 0.5
    accuracy: float = 0.01
    reads = "numbers"

    def __init__(self, field: str, q: float = 0.5, accuracy: float = 0.01, *, empty: Any = None) -> None:
        super().__init__(field=field, q=q, accuracy=accuracy, empty=empty)

    @field_validator("q")
    @classmethod
    def _share(cls, q: float) -> float:
        if not 0 <= q <= 1:
            raise ValueError(f"q must lie between 0 and 1: {q}. The median is q=0.5")
        return q

    @field_validator("accuracy")
    @classmethod
    def _sensible(cls, accuracy: float) -> float:
        if not 0.0001 <= accuracy <= 0.5:
            raise ValueError(f"accuracy must lie between 0.0001 and 0.5: {accuracy}. It is a relative error")
        return accuracy

    @property
    def stem(self) -> str:
        return f"{self.field}_q{self.q * 100:g}"


class TimeSince(Aggregate):
    """Seconds since the entity's previous event in the window, the asking event itself left out.

    >>> TimeSince().stem
    'time_since'
    """

    def __init__(self, *, empty: Any = None) -> None:
        super().__init__(empty=empty)

    @property
    def stem(self) -> str:
        return "time_since"


class Rate(Aggregate):
    """Events per `per` (a duration) over the window's length.

    Over Lifetime() and Session() the length is the time since the first event, and the rate is empty until some time
    has passed; over Tiled() it is the length that its tiles cover.

    >>> Rate(per="1h").stem
    'rate_per_1h'
    """

    per_us: int

    def __init__(self, per: str | int | timedelta = "1h", *, empty: Any = 0.0) -> None:
        super().__init__(per_us=_positive_duration("per", per), empty=empty)

    @property
    def stem(self) -> str:
        return f"rate_per_{duration_text(self.per_us)}"


class River(Aggregate):
    """Any univariate statistic of river over a numeric field. Over Lifetime() only.

    Every entity gets a deep copy. While it is empty, its value is what the statistic's `get()` says.

    >>> from river import stats
    >>> River(stats.Kurtosis(), "amount").stem
    'amount_kurtosis'
    """

    stat: Univariate
    reads = "numbers"

    def __init__(self, stat: Univariate, field: str) -> None:
        super().__init__(stat=stat, field=field)

    @property
    def stem(self) -> str:
        return f"{self.field}_{type(self.stat).__name__.lower()}"


def _positive_duration(name: str, value: str | int | timedelta) -> int:
    us = duration(value)
    if us == 0:
        raise ValueError(f"{name} must be longer than nothing: {value!r}. Try {name}='1h'")
    return us
