"""Declarations of features: Entity (aggregates over windows by key), Derived, Fields; and what `over=` may say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from pydantic import field_validator, model_validator

from features.aggregates import Aggregate, LastValue
from features.declaration import Declaration
from features.durations import duration, duration_text
from features.windows import Duration, LastEvents, Lifetime, Sliding, Window, refusal

__all__ = ["Derived", "Entity", "Fields", "Last", "duration", "duration_text"]

_UNSET: Any = object()


@overload
def Last(what: str, *, empty: Any = None) -> LastValue: ...
@overload
def Last(what: int) -> LastEvents: ...
def Last(what: str | int, *, empty: Any = _UNSET) -> LastValue | LastEvents:
    """`Last("city")` is an aggregate, the latest value of a field; `Last(10)` in `over=` is the last 10 events.

    >>> Last("city").stem, Last(10).label
    ('city_last', 'last_10')
    """
    if isinstance(what, str):
        return LastValue(what, empty=None if empty is _UNSET else empty)
    if isinstance(what, bool) or not isinstance(what, int):
        raise TypeError(f'Last takes a field or a number of events, not {what!r}. Try Last("city") or Last(10)')
    if empty is not _UNSET:
        raise TypeError(f"Last({what}) is a window and takes no empty=. Hint: give it to the aggregates")
    return LastEvents(what)


class Entity(Declaration):
    """Aggregates over windows for every value of a key: the features of a card, a shop, a station and hour.

    - `key`: the field, or fields, of the event that tell entities apart.
    - `aggregates`, `over`: every aggregate runs over every window. A window is text ("7d" is `Sliding("7d")`,
      "lifetime" is `Lifetime()`), a timedelta, an int of microseconds, or any window of `features.windows`.
    - `of`: "events" are observed when they come and see themselves; "labels" when their label is revealed.
    - `where`: only events for which this is true are observed; all are answered.
    - `ttl`: an entity not observed for longer than this starts from nothing; at least as long as its windows.
      Without it, entities are forgotten once no window can tell, and with Lifetime() or Last(n) never.
    - `name`: replaces the key in the features' names.

    Raises a ValueError (pydantic's ValidationError) for an aggregate that does not work over a window.

    >>> from features.aggregates import Count, Mean
    >>> cards = Entity("card_id", [Count(), Mean("amount")], over=["1d", "7d"])
    >>> cards.feature_names
    ('count_1d_by_card_id', 'count_7d_by_card_id', 'amount_mean_1d_by_card_id', 'amount_mean_7d_by_card_id')
    >>> Entity(["station", "hour"], [Mean("bikes")]).feature_names
    ('bikes_mean_by_station_and_hour',)
    """

    key: tuple[str, ...]
    aggregates: tuple[Aggregate, ...]
    over: tuple[Window, ...]
    of: Literal["events", "labels"] = "events"
    where: Callable[[Any], bool] | None = None
    ttl_us: int | None = None
    name: str | None = None

    def __init__(
        self,
        key: str | Sequence[str],
        aggregates: Sequence[Aggregate] | Aggregate,
        over: Duration | Window | Sequence[Duration | Window] = "lifetime",
        *,
        of: Literal["events", "labels"] = "events",
        where: Callable[[Any], bool] | None = None,
        ttl: Duration | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            key=(key,) if isinstance(key, str) else tuple(key),
            aggregates=(aggregates,) if isinstance(aggregates, Aggregate) else tuple(aggregates),
            over=tuple(window(each) for each in (over if isinstance(over, list | tuple) else (over,))),
            of=of,
            where=where,
            ttl_us=None if ttl is None else duration(ttl),
            name=name,
        )

    @field_validator("key", "aggregates", "over")
    @classmethod
    def _some(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        if not parts or "" in parts:
            raise ValueError("Entity needs a key, aggregates and windows. Try Entity('card_id', [Count()], over='7d')")
        return parts

    @model_validator(mode="after")
    def _workable(self) -> Entity:
        for aggregate in self.aggregates:
            for over in self.over:
                reason = refusal(aggregate, over)
                if reason is not None:
                    raise ValueError(f"{aggregate!r} does not work over {over!r}: {reason}")
        names = self.feature_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"features declared twice: {', '.join(twice)}. Hint: each aggregate and window once")
        self._check_ttl()
        return self

    @property
    def label(self) -> str:
        """What features' names end on: `name`, or the fields of the key joined by "_and_"."""
        return "_and_".join(self.key) if self.name is None else self.name

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names in the order of the values: by aggregate first, then by window, both as declared."""
        return tuple(
            "_".join(part for part in (aggregate.stem, over.label, "by", self.label) if part)
            for aggregate in self.aggregates
            for over in self.over
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields the aggregates read, each once, in order: what `EntityFeatures` takes the values of."""
        return tuple(dict.fromkeys(each.field for each in self.aggregates if each.field is not None))

    @property
    def forget_after_us(self) -> int | None:
        """How long after its last event an entity equals one never seen; None: never."""
        if self.ttl_us is not None:
            return self.ttl_us
        reaches = [over.reach_us for over in self.over]
        return None if None in reaches else max(reach for reach in reaches if reach is not None)

    def _check_ttl(self) -> None:
        if self.ttl_us is None:
            return
        for over in self.over:
            if over.reach_us is not None and over.reach_us > self.ttl_us:
                raise ValueError(
                    f"ttl={duration_text(self.ttl_us)} is shorter than {over!r} reaches back, "
                    f"{duration_text(over.reach_us)}. Hint: leave ttl out, or make it that long"
                )


class Derived(Declaration):
    """A value computed from the event alone: `fn(event)`. With `feature=False` only for keys and aggregates.

    >>> def is_night(payment): return payment.paid_at.hour < 6
    >>> Derived(is_night).feature_names
    ('is_night',)
    """

    fn: Callable[[Any], Any]
    name: str
    feature: bool = True

    def __init__(self, fn: Callable[[Any], Any], name: str | None = None, feature: bool = True) -> None:
        super().__init__(fn=fn, name=getattr(fn, "__name__", "") if name is None else name, feature=feature)

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if not name or name == "<lambda>":
            raise ValueError("a lambda has no name of its own. Hint: Derived(lambda event: …, name='is_night')")
        return name

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Its name, or nothing where it is no feature."""
        return (self.name,) if self.feature else ()


class Fields(Declaration):
    """Fields of the event that are features as they are.

    >>> Fields("amount", "clouds").feature_names
    ('amount', 'clouds')
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        super().__init__(names=names)

    @field_validator("names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or "" in names:
            raise ValueError(f"Fields needs names of fields, not {names!r}. Try Fields('amount', 'clouds')")
        if len(set(names)) < len(names):
            raise ValueError(f"Fields names a field twice: {names!r}")
        return names

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The fields' names."""
        return self.names


def window(over: Duration | Window) -> Window:
    """The window that an element of `over=` stands for.

    >>> from datetime import timedelta
    >>> window("7d") == Sliding("7d"), window("lifetime") == Lifetime(), window(timedelta(hours=1)).label
    (True, True, '1h')
    """
    if isinstance(over, Window):
        return over
    if isinstance(over, Aggregate):
        raise TypeError(f"{over!r} is an aggregate, not a window. Hint: Last(10) is a window, Last('city') is not")
    if over == "lifetime":
        return Lifetime()
    return Sliding(over)
