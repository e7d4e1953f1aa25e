"""The features of all entities of one declaration: observe events, ask and read as of a time, keep them as rows.

This is the hot road. What can be decided once per declaration is (`Plan`); an entity holds nothing but its state.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from numbers import Integral, Real
from operator import itemgetter
from typing import Any

from features import readers
from features.aggregates import Aggregate
from features.folds import FoldPlan, Folds, Result
from features.history import History, HistoryPlan
from features.rows import APPEND, PUT, Change, Rows, key_text
from features.spec import Entity
from features.windows import Hopping, LastEvents, Lifetime, Session, Sliding, Tiled, Window

Key = str | int | tuple[Any, ...]
_LARGEST = 1 << 1023
_EVENT_BYTES = 64
"""What an event in a row is reckoned to take."""


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

    __slots__ = ("folds", "history", "kept_events", "kept_last", "kept_parts", "kept_whole", "last_seen")

    def __init__(self, plan: Plan, lateness_us: int) -> None:
        self.last_seen: int | None = None
        self.history = None if plan.history is None else History(plan.history)
        self.folds = Folds(plan.folds, lateness_us) if plan.folds else None
        # Its row by now: how many parts, how many events in them beside the state, and the newest event time.
        self.kept_parts = self.kept_events = 0
        self.kept_last: int | None = None
        self.kept_whole = 0  # bytes, when it was last written whole

    def observe(self, plan: Plan, lateness_us: int, t: int, values: tuple[Any, ...]) -> int:
        """Take an event; how many events are in the history up to and including it."""
        if self.last_seen is None or t > self.last_seen:
            self.last_seen = t
        hi = 0
        if self.history is not None:
            assert plan.history is not None
            hi = self.history.observe(plan.history, t, values)
        if self.folds is not None:
            self.folds.observe(plan.folds, lateness_us, t, values)
        return hi

    def __getstate__(self) -> tuple[Any, ...]:
        return self.last_seen, self.history, self.folds, self.kept_whole

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.last_seen, self.history, self.folds, self.kept_whole = state
        self.kept_parts = self.kept_events = 0
        self.kept_last = self.last_seen


class EntityFeatures:
    """All entities of one Entity declaration (within one key group).

    Times are event times in microseconds. `values` are the event's values of `columns`, in that order. With
    `lateness` (microseconds) more than 0, events and questions may come out of order by as much per entity, and are
    answered as if they had not. A value that does not suit its aggregates raises TypeError or ValueError, with the
    field and the value, and changes nothing. The columns in `trusted` are known to hold finite floats, bools and None
    only, and are not looked at again.

    With `rows`, entities are fetched from there when they are first touched, `changes` says what to keep there, and
    `trim` keeps no more than about `cache` entities in memory.

    >>> from features.aggregates import Count, Mean
    >>> cards = EntityFeatures(Entity("card_id", [Count(), Mean("amount")], over="7d"))
    >>> cards.names, cards.columns
    (('count_7d_by_card_id', 'amount_mean_7d_by_card_id'), ('amount',))
    >>> cards.ask("c-1", 0, (10.0,)), cards.ask("c-1", 1_000_000, (20.0,))
    ((1, 10.0), (2, 15.0))
    >>> cards.read("c-2", 1_000_000)
    (0, 0.0)
    """

    __slots__ = (
        "_bound", "_complete", "_forget_after_us", "_lateness_us", "_nothing", "_old", "_plan", "_rows", "_unsaved",
        "_young", "columns", "names",
    )  # fmt: skip

    def __init__(
        self,
        declaration: Entity,
        lateness: int = 0,
        trusted: Collection[str] = (),
        rows: Rows | None = None,
        cache: int = 1_000_000,
    ) -> None:
        self.names = declaration.feature_names
        self.columns = declaration.columns
        self._lateness_us = lateness
        self._forget_after_us = declaration.forget_after_us
        self._plan = Plan(declaration, lateness, trusted)
        # Two generations: what was not touched since the young one began is in the old one, and goes first.
        self._young: dict[Key, EntityState] = {}
        self._old: dict[Key, EntityState] = {}
        self._rows = rows
        self._bound = cache
        self._complete = rows is None or rows.empty()  # no entity is anywhere else than here
        # The events of each entity that its row lacks.
        self._unsaved: dict[Key, list[tuple[int, tuple[Any, ...]]]] | None = None if rows is None else {}
        self._nothing = self._answer(EntityState(self._plan, lateness), 0, 0, False)

    def ask(self, key: Key, t: int, values: tuple[Any, ...]) -> tuple[object, ...]:
        """Observe the event at `t`, then read as of `t`."""
        state, hi = self._observe(key, t, values)
        return self._answer(state, t, hi, True)

    def observe(self, key: Key, t: int, values: tuple[Any, ...]) -> None:
        """Observe an event at `t`."""
        self._observe(key, t, values)

    def read(self, key: Key, t: int) -> tuple[object, ...]:
        """The features as of `t`. Changes nothing, and knows no entity afterwards that it did not before."""
        state = self._young.get(key)
        if state is None:
            state = self._fetch(key)
            if state is None:
                return self._nothing
        hi = 0
        if state.history is not None:
            times = state.history.times
            hi = bisect_right(times, t) if times and t < times[-1] else len(times)
        return self._answer(state, t, hi, False)

    def sweep(self, clock: int) -> int:
        """Forget the entities that equal one never seen, for all times from `clock` - lateness on; returns how many.

        Those with changes that no row has yet stay until the next time, so that their rows are whole.
        """
        if self._forget_after_us is None:
            return 0
        oldest = clock - self._forget_after_us - self._lateness_us
        swept = 0
        for generation in (self._young, self._old):
            gone = [k for k, state in generation.items() if state.last_seen is None or state.last_seen < oldest]
            for key in gone:
                if not self._unsaved or key not in self._unsaved:
                    del generation[key]
                    swept += 1
        self._complete = self._complete and (swept == 0 or self._rows is None)
        return swept

    def __len__(self) -> int:
        """Entities in memory."""
        return len(self._young) + len(self._old)

    @property
    def unsaved(self) -> int:
        """Entities with changes that `changes` has not given yet."""
        return len(self._unsaved or ())

    def changes(self) -> Iterator[Change]:
        """What rows need to follow, since the last call: an entity's new events, or all of it once in a while.

        All of it when the events added to the row outweigh what the entity holds: so what is written follows the
        events, and an entity is read back by few parts and with few events to go through again.
        """
        unsaved = self._unsaved
        if not unsaved:
            return
        self._unsaved = {}
        young, old, forget = self._young, self._old, self._forget_after_us
        dumps = pickle.dumps
        for key, events in unsaved.items():
            state = young.get(key) or old[key]
            # In events; folds hold none, so that is told by the bytes there were.
            held = max(0 if state.history is None else len(state.history.times), state.kept_whole // _EVENT_BYTES)
            state.kept_parts += 1
            state.kept_events += len(events)
            before, state.kept_last = state.kept_last, state.last_seen
            # After so long a pause whoever keeps the rows may have let them go: what is added to must be whole.
            paused = forget is not None and before is not None and events[0][0] - before > forget
            if state.kept_parts == 1:  # it had no row: its events are all there is of it
                yield key_text(key), PUT, dumps((None, events), 5)
            elif paused or state.kept_parts > 8 + held // 8 or state.kept_events > 32 + held:
                state.kept_parts, state.kept_events = 1, 0
                whole = dumps((state, []), 5)
                state.kept_whole = len(whole)
                yield key_text(key), PUT, whole
            else:
                yield key_text(key), APPEND, dumps(events, 5)

    def trim(self) -> None:
        """Let go of the entities that were not touched for long, as far as the bound on memory asks for it.

        Right after `changes` only: every entity is in its row then, and comes back when it is needed.
        """
        if self._rows is not None and len(self._young) > self._bound // 2 and not self._unsaved:
            self._complete = self._complete and not self._old
            self._old, self._young = self._young, {}

    def rebuilt(self, parts: list[Any]) -> EntityState:
        """An entity from the parts of its row: (state or None, events), then more events."""
        (state, events), *later = parts
        if state is None:
            state = EntityState(self._plan, self._lateness_us)
        restored: EntityState = state
        for some in (events, *later):
            for t, values in some:
                try:
                    restored.observe(self._plan, self._lateness_us, t, values)
                except (TypeError, ValueError, OverflowError):  # as when it came: a river statistic refused it
                    pass
            restored.kept_events += len(some)
        restored.kept_parts = len(parts)
        restored.kept_last = restored.last_seen
        return restored

    def _fetch(self, key: Key) -> EntityState | None:
        """An entity that is not among the young: from the old generation or its row."""
        state = self._old.pop(key, None)
        if state is None:
            if self._complete:
                return None
            assert self._rows is not None
            parts = self._rows.get(key_text(key))
            if not parts:
                return None
            state = self.rebuilt(parts)
        self._young[key] = state
        return state

    def _observe(self, key: Key, t: int, values: tuple[Any, ...]) -> tuple[EntityState, int]:
        plan = self._plan
        if plan.checks:
            values = _checked(plan.checks, values)
        state = self._young.get(key)
        if state is None:
            state = self._fetch(key)
            if state is None:
                state = self._young[key] = EntityState(plan, self._lateness_us)
        unsaved = self._unsaved
        if unsaved is not None:
            if key in unsaved:
                unsaved[key].append((t, values))
            else:
                unsaved[key] = [(t, values)]
        return state, state.observe(plan, self._lateness_us, t, values)

    def _answer(self, state: EntityState, t: int, hi: int, asking: bool) -> tuple[object, ...]:
        """The features as of `t`, from the first `hi` events of the history; `asking`: the last of them asks."""
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
