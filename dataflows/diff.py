"""What differs between what two runs wrote: predictions, features, outcomes, metrics, rejects.

A run and a replay of it, or a run and one of another declaration: each is a directory with `predictions.jsonl`,
`outcomes.jsonl`, `metrics.jsonl`, `rejects.jsonl`; a file that is missing counts as empty and is named.

1. `Lines` reads a file record by record; a last line that is cut off, as while a run is writing, is left out.
2. `Join` brings the n-th record of a key in A together with the n-th of that key in B. Both files are read once, the
   one that is behind in event time first; only what has no partner yet is held, and of that no more than declared.
3. `Tally` compares the two records of each pair, field by field and feature by feature.

What counts as equal: values, exactly. Numbers are equal if they are the same number: `1` and `1.0` are, `0.0` and
`-0.0` are. True is no number. null, which stands for NaN and infinities too, equals null and nothing else; a feature
that is null is not a feature that is not there. Pairs that are equal in value and not in bytes (`1` and `1.0`, another
order of features) are counted as `respelled`, and are no difference.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dataflows.events import Metrics, Outcome, Prediction, Reject, to_datetime, to_time_us
from dataflows.job import JobError
from dataflows.order import InputError
from features.sketch import Sketch

MAX_WAITING = 1_000_000
"""Records that may wait for their partner at once, of both files together: 600 MB, with lines of 400 bytes."""

LEAD = 1_000
"""Lines of one file after which the other goes on by one, though it is ahead: its next time may be a wild one."""

KEPT_REPORTS = 20_000
"""More reports of metrics than this are thinned out evenly; they are compared all the same."""

MOMENTS = 200
"""Moments at which metrics are put side by side."""

QUANTILES = (0.5, 0.9, 0.99)
ACCURACY = 0.01

ABSENT = msgspec.UNSET
"""In place of a value that one of two records does not have."""

Progress = Callable[[Path, int], None]
"""Is told now and then of which file how many bytes more were read."""

_OFTEN = 4096


# -- what comes out


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the differences are, over those pairs that differ and can be measured; quantiles within 1 %."""

    count: int
    largest: float
    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """In how many pairs a field or feature differs; `missing_a` of them have a value in B and null or nothing in A."""

    differ: int
    missing_a: int
    missing_b: int
    sizes: Sizes | None


@dataclass(frozen=True, slots=True)
class Single:
    """A record that only one run has; `line` counts from 1."""

    key: Any
    time: datetime | None
    line: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Two records of one key that differ: `{"a": …, "b": …}` for each field that does; absent values are left out."""

    key: Any
    time: datetime | None
    line_a: int
    line_b: int
    fields: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FileRead:
    """What was read of a file; `cut` is the number of a last line that was not complete."""

    path: str
    missing: bool
    records: int
    cut: int | None


@dataclass(frozen=True, slots=True)
class KindDiff:
    """What differs in one kind of records.

    `uncompared` are records that were given up because too many waited for a partner, and those that may be the
    partners of such. `first` is the first in the order of A.
    """

    file_a: FileRead
    file_b: FileRead
    both: int
    equal: int
    respelled: int
    only_a: int
    only_b: int
    uncompared_a: int
    uncompared_b: int
    fields: dict[str, FieldDiff]
    parts: dict[str, FieldDiff]
    first: Difference | None
    first_only_a: Single | None
    first_only_b: Single | None

    @property
    def differs(self) -> bool:
        """Whether there is a difference, or could be one among what was not compared."""
        return self.both != self.equal or any((self.only_a, self.only_b, self.uncompared_a, self.uncompared_b))


@dataclass(frozen=True, slots=True)
class Moment:
    """What both runs had last reported at an event time: `(A, B, B - A)` by metric, None where there is no value."""

    time: datetime
    outcomes: tuple[int, int, int]
    values: dict[str, tuple[float | None, float | None, float | None]]


@dataclass(frozen=True, slots=True)
class RunDiff:
    """What differs between two runs; `reports_a` and `reports_b` are for drawing."""

    a: str
    b: str
    kinds: dict[str, KindDiff]
    moments: list[Moment]
    reports_a: list[Metrics] = field(repr=False)
    reports_b: list[Metrics] = field(repr=False)

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        return any(kind.differs for kind in self.kinds.values())

    def as_dict(self) -> dict[str, Any]:
        """All of it but the reports of metrics, which are as they are in the files."""
        kinds = {name: asdict(kind) for name, kind in self.kinds.items()}
        moments = [asdict(moment) for moment in self.moments]
        return {"a": self.a, "b": self.b, "differs": self.differs, "kinds": kinds, "moments": moments}


# -- equal or not


def same(a: Any, b: Any) -> bool:
    """Whether two values out of JSON are equal.

    >>> same(1, 1.0), same(1, True), same(None, None), same({"a": [0]}, {"a": [False]})
    (True, False, True, False)
    """
    if type(a) is not type(b):
        return _is_number(a) and _is_number(b) and bool(a == b)
    if type(a) is dict:
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if type(a) is list:
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def distance(a: Any, b: Any) -> float | None:
    """How far two numbers are apart, or two distributions where they differ most; None for what has no distance.

    A label that a distribution does not name has no probability there.

    >>> distance(0.25, 1), distance({"x": 0.75, "y": 0.25}, {"x": 1}), distance("x", "y"), distance(0.5, None)
    (0.75, 0.25, None, None)
    """
    if _is_number(a) and _is_number(b):
        try:
            return min(float(abs(a - b)), 1.7e308)  # the distance of -1e308 and 1e308 is none that a float could hold
        except OverflowError:
            return 1.7e308
    if type(a) is dict and type(b) is dict:
        apart = [distance(a.get(label, 0.0), b.get(label, 0.0)) for label in a.keys() | b.keys()]
        known = [size for size in apart if size is not None]
        return max(known) if known and len(known) == len(apart) else None
    return None


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


# -- 1: reading


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of records: what joins them, by which time their file is (nearly) ordered, which field has named parts."""

    record: type[msgspec.Struct]
    key: Callable[[Any], Hashable]
    order: Callable[[Any], int]
    fields: tuple[str, ...]
    part: str | None = None

    def decode(self, raw: bytes) -> Any:
        """A record of this kind; raises ValueError."""
        try:
            return msgspec.json.decode(raw, type=self.record)
        except ValueError:
            # Lone surrogates, which msgspec does not know, come out of the standard library, as they went in.
            return msgspec.convert(json.loads(raw, parse_constant=lambda _: None), type=self.record)


def _fields(record: type[msgspec.Struct], *without: str) -> tuple[str, ...]:
    return tuple(name for name in record.__struct_fields__ if name not in without)


KINDS: dict[str, Kind] = {
    "predictions": Kind(
        Prediction,
        lambda record: record.id,
        lambda record: to_time_us(record.time),
        _fields(Prediction, "id", "features"),
        "features",
    ),
    # Outcomes are written when their labels are known.
    "outcomes": Kind(
        Outcome, lambda record: record.id, lambda record: to_time_us(record.label_time), _fields(Outcome, "id")
    ),
    "metrics": Kind(
        Metrics,
        lambda record: to_time_us(record.time),
        lambda record: to_time_us(record.time),
        _fields(Metrics, "time", "values"),
        "values",
    ),
    "rejects": Kind(Reject, lambda record: record.place, lambda record: 0, _fields(Reject, "place")),
}
"""The kinds that are compared."""


class Line(NamedTuple):
    """A record and where it stands."""

    number: int
    raw: bytes
    record: Any


class Lines:
    """Reads the records of a file, and knows afterwards how many there were."""

    def __init__(self, path: Path, kind: Kind, progress: Progress = lambda path, size: None) -> None:
        self.path = path
        self.kind = kind
        self._progress = progress
        self.missing = False
        self.cut: int | None = None
        self.records = 0

    def __iter__(self) -> Iterator[Line]:
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self.missing = True
            return
        size = 0
        with file:
            for number, raw in enumerate(file, 1):
                record = self._decode(number, raw)
                if record is None:
                    return
                self.records += 1
                size += len(raw)
                if number % _OFTEN == 0:
                    self._progress(self.path, size)
                    size = 0
                yield Line(number, raw, record)
        self._progress(self.path, size)

    def _decode(self, number: int, raw: bytes) -> Any:
        try:
            return self.kind.decode(raw)
        except ValueError as error:
            if not raw.endswith(b"\n"):
                self.cut = number
                return None
            word = self.kind.record.__name__.lower()
            raise InputError(
                f"{self.path}:{number}: not a {word} record: {error}. "
                "Hint: only the last line may be cut off; is this what `millrace run` or `replay` wrote?"
            ) from None

    def read(self) -> FileRead:
        """What was read so far."""
        return FileRead(str(self.path), self.missing, self.records, self.cut)


# -- 2: joining


class Held(NamedTuple):
    """A line that waits for its partner; undecoded, as a record takes several times the memory."""

    number: int
    raw: bytes


class Waiting:
    """The lines of one file that have no partner yet, by key; of one key the first is taken first.

    >>> waiting = Waiting()
    >>> for number, key in enumerate("abb", 1):
    ...     waiting.put(key, Held(number, b""))
    >>> waiting.take("b").number, len(waiting), waiting.take("c")
    (2, 2, None)
    >>> waiting.give_up(), len(waiting), waiting.take("a")
    ([Held(number=1, raw=b'')], 1, None)
    """

    def __init__(self) -> None:
        self._first: OrderedDict[Hashable, Held] = OrderedDict()
        self._more: dict[Hashable, deque[Held]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: Hashable) -> bool:
        return key in self._first

    def put(self, key: Hashable, held: Held) -> None:
        """Have a line wait."""
        self._count += 1
        if key in self._first:
            self._more.setdefault(key, deque()).append(held)
        else:
            self._first[key] = held

    def take(self, key: Hashable) -> Held | None:
        """The line of this key that has waited longest."""
        held = self._first.pop(key, None)
        if held is None:
            return None
        self._count -= 1
        more = self._more.get(key)
        if more is not None:
            self._first[key] = more.popleft()
            if not more:
                del self._more[key]
        return held

    def give_up(self) -> list[Held]:
        """Take all lines of the key that has waited longest."""
        key, held = self._first.popitem(last=False)
        given_up = [held, *self._more.pop(key, ())]
        self._count -= len(given_up)
        return given_up


class Counted:
    """How many lines, and which of them is the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Held | None = None

    def add(self, held: Held) -> None:
        """Count a line."""
        self.count += 1
        if self.first is None or held.number < self.first.number:
            self.first = held


class Side:
    """One of the two files of a join: its next line, what waits, what was left without a partner."""

    def __init__(self, lines: Lines, seen: Callable[[Any], None] | None = None) -> None:
        self.kind = lines.kind
        self.waiting = Waiting()
        self.left = Counted()
        self.given_up = Counted()
        self.read = 0
        self._lines = iter(lines)
        self._seen = seen
        self.line: Line | None = None
        self.key: Hashable = None
        self.time = 0

    def advance(self) -> None:
        """Go to the next line."""
        self.line = line = next(self._lines, None)
        if line is None:
            return
        self.read += 1
        self.key = self.kind.key(line.record)
        self.time = self.kind.order(line.record)
        if self._seen is not None:
            self._seen(line.record)

    def decoded(self, held: Held) -> Line:
        """A line that has waited, with its record again."""
        return Line(*held, self.kind.decode(held.raw))


class Join:
    """Pairs of lines with the same key, the n-th of a key with the n-th; afterwards `sides` know what was left over.

    No more than `max_waiting` lines wait for a partner at once. Beyond that those that have waited longest are given
    up: which is right where one file begins later than the other, and is counted wherever it may not be.
    """

    def __init__(self, a: Side, b: Side, max_waiting: int = MAX_WAITING) -> None:
        self.sides = (a, b)
        self._max_waiting = max_waiting
        self._lead = 0

    def __iter__(self) -> Iterator[tuple[Line, Line]]:
        a, b = self.sides
        a.advance()
        b.advance()
        while a.line is not None and b.line is not None:
            if a.key == b.key and a.key not in a.waiting and a.key not in b.waiting:
                yield a.line, b.line
                a.advance()
                b.advance()
            else:
                side = self._behind()
                yield from self._settle(side)
                side.advance()
        yield from self._rest(a)
        yield from self._rest(b)

    def _behind(self) -> Side:
        """The file to read on in: the earlier one, or at one time that of which less was read."""
        a, b = self.sides
        side, other = (a, b) if (a.time, a.read) <= (b.time, b.read) else (b, a)
        # One wild time would have the whole other file wait; one line in so many costs little where it is none.
        self._lead = self._lead + 1 if self._lead < LEAD else 0
        return side if self._lead else other

    def _settle(self, side: Side) -> Iterator[tuple[Line, Line]]:
        """The pair of a file's next line, if its partner was there; else it waits."""
        assert side.line is not None
        pair = self._partner(side)
        if pair is not None:
            yield pair
            return
        side.waiting.put(side.key, Held(side.line.number, side.line.raw))
        a, b = self.sides
        while len(a.waiting) + len(b.waiting) > self._max_waiting:
            larger = a if len(a.waiting) >= len(b.waiting) else b
            for held in larger.waiting.give_up():
                larger.given_up.add(held)

    def _partner(self, side: Side) -> tuple[Line, Line] | None:
        assert side.line is not None
        a, b = self.sides
        other = b if side is a else a
        held = other.waiting.take(side.key)
        if held is None:
            return None
        partner = other.decoded(held)
        return (side.line, partner) if side is a else (partner, side.line)

    def _rest(self, side: Side) -> Iterator[tuple[Line, Line]]:
        """What is left of a file when the other one has ended: nothing needs to wait any more."""
        while side.line is not None:
            pair = self._partner(side)
            if pair is None:
                side.left.add(Held(side.line.number, side.line.raw))
            else:
                yield pair
            side.advance()
        a, b = self.sides
        other = b if side is a else a
        while other.waiting:
            for held in other.waiting.give_up():
                other.left.add(held)


def without_partner(side: Side, other: Side) -> list[Counted]:
    """Of the lines that a file has left or given up, those that certainly have no partner.

    The partner of a line that was left can only be one that the other file gave up. The partner of one that was given
    up can be any that the other file has left or given up.
    """
    if other.given_up.count:
        return []
    return [side.left] if other.left.count else [side.left, side.given_up]


# -- 3: comparing


class Change:
    """Counts how a field differs.

    >>> change = Change()
    >>> for a, b in [(0.5, 0.75), (0.5, None), (None, "x"), (1, 2)]:
    ...     change.add(a, b)
    >>> found = change.result()
    >>> found.differ, found.missing_a, found.missing_b, found.sizes.largest, found.sizes.mean
    (4, 1, 1, 1.0, 0.625)
    """

    __slots__ = ("_differ", "_largest", "_mean", "_missing_a", "_missing_b", "_sketch")

    def __init__(self) -> None:
        self._differ = self._missing_a = self._missing_b = 0
        self._largest = self._mean = 0.0
        self._sketch = Sketch(0.5, ACCURACY)

    def add(self, a: Any, b: Any) -> None:
        """Count two values that are not the same."""
        self._differ += 1
        nothing_a, nothing_b = a is None or a is ABSENT, b is None or b is ABSENT
        if nothing_a or nothing_b:
            self._missing_a += not nothing_b
            self._missing_b += not nothing_a
            return
        size = distance(a, b)
        if size is not None:
            self._sketch.add(size, 0)
            self._largest = max(self._largest, size)
            self._mean += (size - self._mean) / self._sketch.n

    def result(self) -> FieldDiff:
        """What was counted."""
        return FieldDiff(self._differ, self._missing_a, self._missing_b, self._sizes())

    def _sizes(self) -> Sizes | None:
        if self._sketch.n == 0:
            return None
        return Sizes(self._sketch.n, self._largest, self._mean, {f"p{q * 100:g}": self._at(q) for q in QUANTILES})

    def _at(self, q: float) -> float:
        sketch = Sketch(q, ACCURACY)
        sketch.merge(self._sketch)
        value = sketch.get()
        assert isinstance(value, float)
        return min(value, self._largest)  # the middle of a bucket may lie above all that is in it


class Tally:
    """Compares pair after pair of one kind."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self.both = self.equal = self.respelled = 0
        self.fields: dict[str, Change] = {}
        self.parts: dict[str, Change] = {}
        self.first: Difference | None = None

    def add(self, a: Line, b: Line) -> None:
        """Take two records of the same key."""
        self.both += 1
        if a.raw == b.raw:
            self.equal += 1
            return
        differing = self._differing(a.record, b.record)
        if not differing:
            self.equal += 1
            self.respelled += 1
        elif self.first is None or a.number < self.first.line_a:
            self.first = self._difference(a, b, differing)

    def _differing(self, a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
        """The two values of each field, and of each part, that is not the same; all are counted."""
        found = self._of_fields(a, b)
        part = self._kind.part
        if part is not None:
            for name, values in unequal(getattr(a, part), getattr(b, part)).items():
                self.parts.setdefault(name, Change()).add(*values)
                found[f"{part}.{name}"] = values
        return found

    def _of_fields(self, a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for name in self._kind.fields:
            values = getattr(a, name), getattr(b, name)
            if not same(*values):
                self.fields.setdefault(name, Change()).add(*values)
                found[name] = values
        return found

    def _difference(self, a: Line, b: Line, differing: dict[str, tuple[Any, Any]]) -> Difference:
        fields = {
            name: {side: value for side, value in zip("ab", values, strict=True) if value is not ABSENT}
            for name, values in differing.items()
        }
        return Difference(*_name(self._kind, a.record), a.number, b.number, fields)


def unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that two records do not share, by name; in the order of A, then what only B has.

    >>> unequal({"x": 1, "y": 2}, {"y": 3, "x": 1.0, "z": None})
    {'y': (2, 3), 'z': (UNSET, None)}
    """
    pairs = {name: (value, b.get(name, ABSENT)) for name, value in a.items()}
    pairs |= {name: (ABSENT, value) for name, value in b.items() if name not in a}
    return {name: values for name, values in pairs.items() if not same(*values)}


def _name(kind: Kind, record: Any) -> tuple[Any, datetime | None]:
    """What a record is known by (its id; of metrics their time, of rejects their place), and its event time."""
    time = getattr(record, "time", None)
    return (time if kind.record is Metrics else kind.key(record)), time


# -- metrics over time


class Reports:
    """The reports of one run, thinned out evenly when they become too many; the last one is always there.

    >>> reports = Reports(limit=4)
    >>> for number in range(11):
    ...     reports.add(number)
    >>> reports.kept()
    [0, 4, 8, 10]
    """

    def __init__(self, limit: int = KEPT_REPORTS) -> None:
        self._limit = limit
        self._kept: list[Any] = []
        self._last: Any = None
        self._every = 1
        self._count = 0

    def add(self, report: Any) -> None:
        """Take the next report."""
        if self._count % self._every == 0:
            self._kept.append(report)
            if len(self._kept) > self._limit:
                del self._kept[1::2]
                self._every *= 2
        self._last = report
        self._count += 1

    def kept(self) -> list[Any]:
        """The reports that were kept."""
        if not self._kept or self._kept[-1] is self._last:
            return self._kept
        return [*self._kept, self._last]


def side_by_side(a: Sequence[Metrics], b: Sequence[Metrics], limit: int = MOMENTS) -> list[Moment]:
    """What both runs had reported, at up to `limit` times at which one of them did.

    Only where both had begun and neither had ended: a run that went on longer is not compared with one that did not.
    """
    if not a or not b:
        return []
    by_time_a, by_time_b = (sorted((to_time_us(r.time), i, r) for i, r in enumerate(side)) for side in (a, b))
    times_a, times_b = ([time for time, _, _ in side] for side in (by_time_a, by_time_b))
    begin, end = max(times_a[0], times_b[0]), min(times_a[-1], times_b[-1])
    times = sorted({time for time in (*times_a, *times_b) if begin <= time <= end})
    return [
        _moment(time, by_time_a[bisect_right(times_a, time) - 1][2], by_time_b[bisect_right(times_b, time) - 1][2])
        for time in spread(times, limit)
    ]


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of these, evenly spread, the last one always and the first one if there may be two.

    >>> spread("abcdefg", 3), spread("abc", 1), spread("ab", 9)
    (['a', 'd', 'g'], ['c'], ['a', 'b'])
    """
    if len(items) <= limit:
        return list(items)
    if limit == 1:
        return [items[-1]]
    return [items[i * (len(items) - 1) // (limit - 1)] for i in range(limit)]


def _moment(time: int, a: Metrics, b: Metrics) -> Moment:
    names = dict.fromkeys((*a.values, *b.values))
    values = {name: _apart(a.values.get(name), b.values.get(name)) for name in names}
    return Moment(to_datetime(time), (a.outcomes, b.outcomes, b.outcomes - a.outcomes), values)


def _apart(a: float | None, b: float | None) -> tuple[float | None, float | None, float | None]:
    return a, b, None if a is None or b is None else b - a


# -- all of it


def compare(a: Path, b: Path, max_waiting: int = MAX_WAITING, progress: Progress | None = None) -> RunDiff:
    """What differs between the runs in two directories.

    Raises `JobError` where there is nothing to compare, and `InputError` for a line that is no record.
    """
    for path in (a, b):
        if not path.is_dir():
            raise JobError(
                f"{path} is not a directory. Hint: give that of a run, or that of `millrace replay --output`"
            )
    kinds: dict[str, KindDiff] = {}
    reports = Reports(), Reports()
    for name, kind in KINDS.items():
        lines = [Lines(run / f"{name}.jsonl", kind, *([] if progress is None else [progress])) for run in (a, b)]
        seen = [side.add if name == "metrics" else None for side in reports]
        join = Join(Side(lines[0], seen[0]), Side(lines[1], seen[1]), max_waiting)
        tally = Tally(kind)
        for pair in join:
            tally.add(*pair)
        kinds[name] = _result(lines[0].read(), lines[1].read(), join, tally)
        if name == "predictions":
            _require(kinds[name])
    reports_a, reports_b = reports[0].kept(), reports[1].kept()
    return RunDiff(str(a), str(b), kinds, side_by_side(reports_a, reports_b), reports_a, reports_b)


def _require(predictions: KindDiff) -> None:
    files = predictions.file_a, predictions.file_b
    if not any(file.records for file in files):
        raise JobError(
            f"there are no predictions in {files[0].path} nor in {files[1].path}. Hint: give the directories of two "
            "runs, or of `millrace replay --output`; what went to topics is not read"
        )


def total_bytes(*runs: Path) -> int:
    """How much there is to read."""
    files = [run / f"{name}.jsonl" for run in runs for name in KINDS]
    return sum(file.stat().st_size for file in files if file.exists())


def _result(file_a: FileRead, file_b: FileRead, join: Join, tally: Tally) -> KindDiff:
    a, b = join.sides
    only_a, only_b = without_partner(a, b), without_partner(b, a)
    count_a, count_b = (sum(counted.count for counted in only) for only in (only_a, only_b))
    return KindDiff(
        file_a=file_a,
        file_b=file_b,
        both=tally.both,
        equal=tally.equal,
        respelled=tally.respelled,
        only_a=count_a,
        only_b=count_b,
        uncompared_a=a.left.count + a.given_up.count - count_a,
        uncompared_b=b.left.count + b.given_up.count - count_b,
        fields=_ranked(tally.fields),
        parts=_ranked(tally.parts),
        first=tally.first,
        first_only_a=_first(a, only_a),
        first_only_b=_first(b, only_b),
    )


def _ranked(changes: dict[str, Change]) -> dict[str, FieldDiff]:
    found = {name: change.result() for name, change in changes.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].differ))


def _first(side: Side, only: list[Counted]) -> Single | None:
    firsts = [counted.first for counted in only if counted.first is not None]
    if not firsts:
        return None
    first = min(firsts)
    return Single(*_name(side.kind, side.decoded(first).record), first.number)
