"""The features of all entities of one declaration: observe events, ask and read as of a time, snapshot.

This is the hot road. What can be decided once per declaration is (`Plan`); an entity holds nothing but its state.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Callable, Collection
from decimal import Decimal
from numbers import Integral, Real
from operator import itemgetter
from typing import Any

from features import readers
from features.aggregates import Aggregate
from features.folds import FoldPlan, Folds, Result
from features.history import History, HistoryPlan
from features.spec import Entity
from features.windows import Hopping, LastEvents, Lifetime, Session, Sliding, Tiled, Window

Key = str | int | tuple[Any, ...]
FORMAT = 1
"""The layout of snapshots; another one is refused."""
_LARGEST = 1 << 1023


class Plan:
    """What follows from a declaration alone, computed once."""

    __slots__ = ("checks", "folds", "history", "order", "readers")

    def __init__(self, declaration: Entity, lateness_us: int, trusted: Collection[str]) -> None:
        exact: list[Window] = [over for over in declaration.over if isinstance(over, Sliding | LastEvents)]
        exact.sort(key=lambda over: isinstance(over, LastEvents))  # spans first: History.bounds goes in this order
        folded = [over for over in declaration.over if over not in exact]
        self.history = _history_plan(declaration, lateness_us) if exact else None
        self.readers = _history_readers(declaration, self.history) if self.history is not None else ()
        self.folds = tuple(_fold_plan(declaration, over) for over in folded)
        self.order = _order(declaration, exact, folded)
        self.checks = tuple(check for check in _checks(declaration) if check[1] not in trusted)


class EntityState:
    """One entity: the events its exact windows need, and the accumulators of the others."""

    __slots__ = ("folds", "history", "last_seen")

    def __init__(self, plan: Plan, lateness_us: int) -> None:
        self.last_seen: int | None = None
        self.history = None if plan.history is None else History(plan.history)
        self.folds = Folds(plan.folds, lateness_us) if plan.folds else None

    def __getstate__(self) -> tuple[Any, ...]:
        return self.last_seen, self.history, self.folds

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.last_seen, self.history, self.folds = state


class EntityFeatures:
    """All entities of one Entity declaration (within one key group).

    Times are event times in microseconds. `values` are the event's values of `columns`, in that order. With
    `lateness` (microseconds) more than 0, events and questions may come out of order by as much per entity, and are
    answered as if they had not. A value that does not suit its aggregates raises TypeError or ValueError, with the
    field and the value, and changes nothing. The columns in `trusted` are known to hold finite floats, bools and None
    only, and are not looked at again.

    >>> from features.aggregates import Count, Mean
    >>> cards = EntityFeatures(Entity("card_id", [Count(), Mean("amount")], over="7d"))
    >>> cards.names, cards.columns
    (('count_7d_by_card_id', 'amount_mean_7d_by_card_id'), ('amount',))
    >>> cards.ask("c-1", 0, (10.0,)), cards.ask("c-1", 1_000_000, (20.0,))
    ((1, 10.0), (2, 15.0))
    >>> cards.read("c-2", 1_000_000)
    (0, 0.0)
    """

    __slots__ = ("_entities", "_forget_after_us", "_lateness_us", "_nothing", "_plan", "columns", "names")

    def __init__(self, declaration: Entity, lateness: int = 0, trusted: Collection[str] = ()) -> None:
        self.names = declaration.feature_names
        self.columns = declaration.columns
        self._lateness_us = lateness
        self._forget_after_us = declaration.forget_after_us
        self._plan = Plan(declaration, lateness, trusted)
        self._entities: dict[Key, EntityState] = {}
        self._nothing = self._row(EntityState(self._plan, lateness), 0, 0, False)

    def ask(self, key: Key, t: int, values: tuple[Any, ...]) -> tuple[object, ...]:
        """Observe the event at `t`, then read as of `t`."""
        state, hi = self._observe(key, t, values)
        return self._row(state, t, hi, True)

    def observe(self, key: Key, t: int, values: tuple[Any, ...]) -> None:
        """Observe an event at `t`."""
        self._observe(key, t, values)

    def read(self, key: Key, t: int) -> tuple[object, ...]:
        """The features as of `t`. Changes nothing, and knows no entity afterwards that it did not before."""
        state = self._entities.get(key)
        if state is None:
            return self._nothing
        hi = 0
        if state.history is not None:
            times = state.history.times
            hi = bisect_right(times, t) if times and t < times[-1] else len(times)
        return self._row(state, t, hi, False)

    def sweep(self, clock: int) -> int:
        """Forget the entities that equal one never seen, for all times from `clock` - lateness on; returns how many."""
        if self._forget_after_us is None:
            return 0
        oldest = clock - self._forget_after_us - self._lateness_us
        gone = [key for key, state in self._entities.items() if state.last_seen is None or state.last_seen < oldest]
        for key in gone:
            del self._entities[key]
        return len(gone)

    def __len__(self) -> int:
        return len(self._entities)

    def snapshot(self) -> bytes:
        """All state; `restore` continues from it to the last bit."""
        return pickle.dumps((FORMAT, self.names, self._lateness_us, self._entities), pickle.HIGHEST_PROTOCOL)

    def restore(self, snapshot: bytes) -> None:
        """Replace all state by that of a snapshot. Raises ValueError if it is of another declaration or format.

        Unpickles: only for snapshots from a trusted place.
        """
        layout, *rest = pickle.loads(snapshot)
        if layout != FORMAT:
            raise ValueError(f"the snapshot has format {layout!r}, this is format {FORMAT}")
        names, lateness_us, entities = rest
        if (names, lateness_us) != (self.names, self._lateness_us):
            raise ValueError(
                f"the snapshot is of other features: {names}, lateness {lateness_us} µs; "
                f"these are {self.names}, lateness {self._lateness_us} µs. "
                "Hint: restore it with the declaration it was taken with"
            )
        self._entities = entities

    def _observe(self, key: Key, t: int, values: tuple[Any, ...]) -> tuple[EntityState, int]:
        plan = self._plan
        if plan.checks:
            values = _checked(plan.checks, values)
        state = self._entities.get(key)
        if state is None:
            state = self._entities[key] = EntityState(plan, self._lateness_us)
        if state.last_seen is None or t > state.last_seen:
            state.last_seen = t
        hi = 0
        if state.history is not None:
            assert plan.history is not None
            hi = state.history.observe(plan.history, t, values)
        if state.folds is not None:
            state.folds.observe(plan.folds, self._lateness_us, t, values)
        return state, hi

    def _row(self, state: EntityState, t: int, hi: int, asking: bool) -> tuple[object, ...]:
        plan = self._plan
        out: list[object] = []
        history = state.history
        if history is not None:
            assert plan.history is not None
            bounds = history.bounds(plan.history, t, hi)
            for reader in plan.readers:
                reader.read(history, bounds, hi, hi - asking, t, out)
        if state.folds is not None:
            state.folds.read(plan.folds, t, asking, out)
        return tuple(out) if plan.order is None else plan.order(out)


def value_check(declaration: Entity) -> Callable[[tuple[Any, ...]], None]:
    """A function that raises TypeError or ValueError for values that `observe` would refuse, before they get there.

    >>> from features.aggregates import Mean
    >>> value_check(Entity("shop", [Mean("fraud")], of="labels"))(("maybe",))
    Traceback (most recent call last):
    TypeError: field 'fraud': 'maybe' of type str is not a number. Hint: None stands for no value
    """
    checks = _checks(declaration)

    def check(values: tuple[Any, ...]) -> None:
        _checked(checks, values)

    return check


def _history_plan(declaration: Entity, lateness_us: int) -> HistoryPlan:
    by_column = [[each for each in declaration.aggregates if each.field == name] for name in declaration.columns]
    return HistoryPlan(
        spans_us=tuple(over.length_us for over in declaration.over if isinstance(over, Sliding)),
        lasts=tuple(over.count for over in declaration.over if isinstance(over, LastEvents)),
        ttl_us=declaration.ttl_us,
        lateness_us=lateness_us,
        columns=tuple(readers.needs(each) for each in by_column),
        movers=tuple(
            (_column(declaration, each), build)
            for each in declaration.aggregates
            if (build := readers.moving(each)) is not None
        ),
    )


def _history_readers(declaration: Entity, plan: HistoryPlan) -> tuple[readers.Reader, ...]:
    result: list[readers.Reader] = []
    movers = 0
    for each in declaration.aggregates:
        result.append(readers.reader(each, _column(declaration, each), plan, movers))
        movers += readers.moving(each) is not None
    return tuple(result)


def _fold_plan(declaration: Entity, over: Window) -> FoldPlan:
    build = readers.tiled if isinstance(over, Hopping | Tiled) else readers.running
    parts: list[tuple[int | None, Callable[[], Any]]] = []
    results = []
    for each in declaration.aggregates:
        part = (None if each.field is None else _column(declaration, each), build(each))
        if part not in parts:
            parts.append(part)
        results.append(Result(parts.index(part), readers.finish(each), each.empty))
    gap_us = over.gap_us if isinstance(over, Session) else declaration.ttl_us if isinstance(over, Lifetime) else None
    return FoldPlan(over, gap_us, tuple(parts), tuple(results), tuple(make() for _, make in parts))


def _order(declaration: Entity, exact: list[Window], folded: list[Window]) -> Callable[[list[object]], Any] | None:
    """Puts values computed window kind by window kind into the declared order; None where they are."""
    computed = [(each, over) for each in declaration.aggregates for over in exact]
    computed += [(each, over) for over in folded for each in declaration.aggregates]
    declared = [computed.index((each, over)) for each in declaration.aggregates for over in declaration.over]
    if declared == list(range(len(declared))):
        return None
    return itemgetter(*declared)


def _column(declaration: Entity, aggregate: Aggregate) -> int:
    return -1 if aggregate.field is None else declaration.columns.index(aggregate.field)


def _checks(declaration: Entity) -> tuple[tuple[int, str, bool, bool], ...]:
    """The place and field of each column whose values must be numbers, or hashable, or both."""
    result = []
    for place, field in enumerate(declaration.columns):
        reads = {each.reads for each in declaration.aggregates if each.field == field}
        if reads != {"anything"}:
            result.append((place, field, "numbers" in reads, "hashables" in reads))
    return tuple(result)


def _checked(checks: tuple[tuple[int, str, bool, bool], ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, with numbers of other types as int or float. Raises before anything has changed."""
    for place, field, number, hashable in checks:
        value = values[place]
        kind = type(value)
        if (kind is float and value - value == 0.0) or value is None or kind is bool:
            continue
        if number:
            value = _number(field, value)
        if hashable:
            _check_hashable(field, value)
        if value is not values[place]:
            values = (*values[:place], value, *values[place + 1 :])
    return values


def _number(field: str, value: Any) -> int | float:
    if isinstance(value, Integral):
        whole = int(value)
        if not -_LARGEST < whole < _LARGEST:
            raise ValueError(f"field {field!r}: an int of more than 1023 bits is beyond what a float can hold")
        return whole
    if isinstance(value, Real | Decimal):
        number = float(value)
        if number - number == 0.0:
            return number
        raise ValueError(f"field {field!r}: {value!r} is not a finite number. Hint: None stands for no value")
    raise TypeError(
        f"field {field!r}: {value!r} of type {type(value).__name__} is not a number. Hint: None stands for no value"
    )


def _check_hashable(field: str, value: Any) -> None:
    if value != value:
        raise ValueError(f"field {field!r}: {value!r} is not equal to itself, so it cannot be counted. Hint: use None")
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"field {field!r}: {value!r} of type {type(value).__name__} cannot be counted, it has no hash. "
            "Hint: a str, a number or a tuple"
        ) from None
