"""What is taken from an event: the keys and values of its entities, its static features, what labels find it by.

Everything a declaration decides is compiled once here, into functions of the event's fields. A row is here what goes
from an event to the features; state as rows is `features.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any
from zlib import crc32

from dataflows.events import EventId, plain_types, to_time_us
from dataflows.job import Job
from features.lookup import Lookup
from features.spec import Derived, Entity, Fields
from features.state import value_check


class _NoLabel:
    """The type of `NO_LABEL`: labels may be None, 0, False or "", so absence has an object of its own."""

    def __reduce__(self) -> str:
        return "NO_LABEL"


NO_LABEL = _NoLabel()


def key_group(key: Any, groups: int) -> int:
    """The key group of an entity, the same in every process: crc32 of its text.

    >>> key_group("card-7", 16) == key_group("card-7", 16)
    True
    """
    return crc32(str(key).encode("utf-8", "surrogatepass")) % groups


class EntityRows:
    """How one Entity declaration takes its key and values from an event."""

    __slots__ = ("index", "of_labels", "key", "values", "where", "label_at", "width", "places", "_check")

    def __init__(self, index: int, entity: Entity, job: Job, groups: int) -> None:
        label_field = job.label.field
        self.index = index
        self.places = [(index, group) for group in range(groups)]  # one tuple each, not one per event
        self.of_labels = entity.of == "labels"
        self.key = key_getter(entity.key, job)
        self.label_at = -1
        columns = entity.columns
        self.width = len(columns)
        if self.of_labels and label_field in columns:
            self.label_at = columns.index(label_field)
        self.values = _values_getter(columns, label_field if self.of_labels else None)
        self.where = entity.where
        self._check = value_check(entity)

    def check(self, values: tuple[Any, ...] | None, label: Any) -> None:
        """Raises TypeError or ValueError for what a label-derived feature could not take once the label is known."""
        if values is not None:
            self._check(values if label is NO_LABEL else self.answered(values, label))

    def answered(self, values: tuple[Any, ...], label: Any) -> tuple[Any, ...]:
        """The values with the label in its place."""
        at = self.label_at
        if at < 0:
            return values
        return (label,) if len(values) == 1 else (*values[:at], label, *values[at + 1 :])


def canonical(part: Any) -> Any:
    """A key, or part of one, that is equal exactly where its text is: other types than text and int become text.

    An entity's key group comes from its text, its state from equality; 0.0 and -0.0, or 1 and True, must not be one
    entity in one group and two in two.

    >>> canonical(7), canonical("a"), canonical(True), canonical(None), canonical([1])
    (7, 'a', 'True', None, '[1]')
    """
    return part if type(part) is int or type(part) is str or part is None else str(part)


def key_getter(names: tuple[str, ...], job: Job) -> Callable[[dict[str, Any]], Any]:
    """The entity's key, None if any part of it is None: then there is no entity to keep features of."""
    fields = job.events.event.model_fields
    derived = {f.name for f in job.features if isinstance(f, Derived)}
    plain = all(n in fields and n not in derived and plain_types(fields[n].annotation) <= {int, str} for n in names)
    if len(names) == 1:
        get = itemgetter(names[0])
        return get if plain else lambda row: canonical(get(row))

    def compound(row: dict[str, Any]) -> tuple[Any, ...] | None:
        key = tuple([canonical(row[name]) for name in names])
        return None if None in key else key

    return compound


def _values_getter(columns: tuple[str, ...], hole: str | None) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    names = [c for c in columns if c != hole]
    if not names:
        nothing = (None,) * len(columns)
        return lambda row: nothing
    if len(names) < len(columns):
        return lambda row: tuple([None if c == hole else row[c] for c in columns])
    if len(names) == 1:
        name = names[0]
        return lambda row: (row[name],)
    return itemgetter(*names)


def matchers(job: Job) -> tuple[Callable[[dict[str, Any], EventId, int], Hashable], Callable[[Any, Any], Hashable]]:
    """How an event and a label name the question that they share."""
    label = job.label
    if label.on is None or label.at is None:
        return (lambda row, id, time: id), (lambda event, id: id)
    names, at = label.on, label.at
    scale = job.events.event.time_scale

    def of_event(row: dict[str, Any], id: EventId, time: int) -> Hashable:
        return (*[canonical(row[n]) for n in names], time)

    def of_label(event: Any, id: Any) -> Hashable:
        asked_at = getattr(event, at)
        time = round(asked_at * scale) if isinstance(asked_at, int | float) and scale else to_time_us(asked_at)
        return (*[canonical(getattr(event, n)) for n in names], time)

    return of_event, of_label


def static_values(job: Job) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """The feature values that the event alone gives: fields, derived values, rows of static tables."""
    steps: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []
    names: tuple[str, ...] = ()
    for feature in job.features:
        if isinstance(feature, Fields | Derived):
            names += feature.feature_names
        elif isinstance(feature, Lookup):
            steps += [_values_getter(names, None)] if names else []
            steps.append(_lookup(feature))
            names = ()
    steps += [_values_getter(names, None)] if names or not steps else []
    if len(steps) == 1:
        return steps[0]
    return lambda row: tuple([value for step in steps for value in step(row)])


def _lookup(feature: Lookup) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    table, key = feature.load(), feature.key
    return lambda row: table.get(row[key])


def entity_step_names(job: Job) -> list[str]:
    """A name for each Entity declaration, from its key; told apart by what it observes, then by number.

    The engine keeps state by these names, so they must be unique and must not change by themselves.
    """
    names: list[str] = []
    for entity in job.entities:
        options = [entity.label, f"{entity.label}_of_{entity.of}"]
        options += [f"{options[1]}_{number}" for number in range(2, len(job.entities) + 2)]
        names.append(next(option for option in options if option not in names))
    return names
