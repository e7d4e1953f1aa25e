"""What travels: events and labels that come in, records that go out, and the way between bytes and objects.

An *event class* is a pydantic model that names the fields holding its id and its event time:

>>> from datetime import datetime
>>> class Payment(Event, id="payment_id", time="paid_at"):
...     payment_id: str
...     paid_at: datetime
...     amount: float
>>> payment = Payment.decode(b'{"payment_id": "p1", "paid_at": "2024-01-01T00:00:01Z", "amount": 5}')
>>> payment.event_id(), payment.event_time()
('p1', 1704067201000000)

Event time is an integer of microseconds since 1970-01-01T00:00:00Z inside; aware datetimes at the edges.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from types import UnionType
from typing import Any, ClassVar, ForwardRef, Literal, NamedTuple, Self, Union, get_args, get_origin
from uuid import UUID

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
INT64 = 2**63
"""Ids and times are refused beyond 64 bits: no other system that reads our records could hold them."""

EventId = int | str
Unit = Literal["s", "ms", "us"]


class Undecodable(ValueError):
    """Bytes that are not an event: `reason` is a short code for counting, the message tells the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class NoEvent(Undecodable):
    """A record that says nothing happened, such as a tombstone: it is counted and passed over, and is no reject."""

    def __init__(self) -> None:
        super().__init__("tombstone", "the record holds no value")


def to_datetime(time_us: int) -> datetime:
    """The aware datetime of an event time in microseconds.

    >>> to_datetime(1_500_000)
    datetime.datetime(1970, 1, 1, 0, 0, 1, 500000, tzinfo=datetime.timezone.utc)
    """
    return EPOCH + timedelta(0, 0, time_us)


def to_time_us(moment: datetime | date | str | int) -> int:
    """The event time in microseconds of a datetime, a date, or ISO text; without a zone it is taken as UTC.

    >>> to_time_us("1970-01-01T00:00:01")
    1000000
    """
    if isinstance(moment, int):
        return moment
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    since = (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)) - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


class Event(BaseModel):
    """Base of event and label classes; class keywords say which fields hold the id and the event time.

    Parameters (of the class statement)
    -----------------------------------
    id
        The field with the event's id (`int`, `str` or `UUID`); without one, the place where it was read
        serves as id and duplicates cannot be recognised.
    time
        The field with the event time: a `datetime` (without a zone: UTC), or a number with a `unit`.
    unit
        "s", "ms" or "us": what a numeric time counts since 1970-01-01T00:00:00Z.

    Raises `TypeError` when the class is declared with fields that are not there or cannot serve.

    >>> class Reading(Event, time="ts", unit="ms"):
    ...     ts: int
    ...     level: float
    >>> Reading(ts=12, level=0.5).event_time()
    12000
    """

    # NaN and infinities would poison sums and models for good, so they are refused at the door.
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    id_field: ClassVar[str | None] = None
    time_field: ClassVar[str] = ""
    time_scale: ClassVar[int | None] = None
    text_fields: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Python hands class keywords to this hook before the fields exist; the next one reads them.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(
        cls, id: str | None = None, time: str | None = None, unit: Unit | None = None, **kwargs: Any
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.id_field = id if id is not None else cls.id_field
        cls.time_field = time if time is not None else cls.time_field
        cls._check_id()
        cls._check_time(unit)
        cls.text_fields = frozenset(
            name
            for field_name, field in cls.model_fields.items()
            if str in plain_types(field.annotation)
            for name in (field_name, field.alias)
            if name is not None
        )

    @classmethod
    def _check_id(cls) -> None:
        if cls.id_field is None:
            return
        kinds = plain_types(cls._annotation("id", cls.id_field))
        cls._refuse_missing(cls.id_field, "id")
        if len(kinds) != 1 or not kinds <= {int, str, UUID}:
            raise TypeError(
                f"{cls.__name__}: id field {cls.id_field!r} is {_names(kinds)}; an id is one of int, str, UUID"
            )

    @classmethod
    def _check_time(cls, unit: Unit | None) -> None:
        if not cls.time_field:
            raise TypeError(f"{cls.__name__} names no event time. Hint: class {cls.__name__}(Event, time='FIELD')")
        kinds = plain_types(cls._annotation("time", cls.time_field))
        cls._refuse_missing(cls.time_field, "time")
        if unit is not None and unit not in UNITS:
            raise TypeError(f"{cls.__name__}: unit {unit!r} is not one of 's', 'ms', 'us'")
        if kinds <= {datetime}:
            cls.time_scale = None
        elif len(kinds) == 1 and kinds <= {int, float}:
            if unit is not None:
                cls.time_scale = UNITS[unit]
            if cls.time_scale is None:
                raise TypeError(
                    f"{cls.__name__}: time field {cls.time_field!r} is a number of unknown unit. "
                    "Hint: add unit='s', 'ms' or 'us' to the class"
                )
        else:
            raise TypeError(
                f"{cls.__name__}: time field {cls.time_field!r} is {_names(kinds)}; use datetime, int or float"
            )

    @classmethod
    def _refuse_missing(cls, name: str, role: str) -> None:
        if type(None) in get_args(cls.model_fields[name].annotation):
            raise TypeError(f"{cls.__name__}: {role} field {name!r} may be None; every event needs its {role}")

    @classmethod
    def _annotation(cls, role: str, name: str) -> Any:
        if name not in cls.model_fields:
            raise TypeError(f"{cls.__name__}: {role}={name!r} is not one of its fields ({', '.join(cls.model_fields)})")
        annotation = cls.model_fields[name].annotation
        if isinstance(annotation, str | ForwardRef):
            raise TypeError(
                f"{cls.__name__}: the type {annotation!r} of {name!r} cannot be resolved where the class stands. "
                "Hint: declare event classes at the top of a module that imports the type"
            )
        return annotation

    def event_id(self) -> EventId | None:
        """The id, or None for classes without one; raises `Undecodable` for integers beyond 64 bits."""
        if self.id_field is None:
            return None
        value = self.__dict__[self.id_field]
        if type(value) is int:
            if not -INT64 <= value < INT64:
                raise Undecodable("invalid", f"{self.id_field}: {_short(value)} does not fit 64 bits")
            return value
        return value if type(value) is str else str(value)

    def event_time(self) -> int:
        """The event time in microseconds since 1970-01-01T00:00:00Z."""
        value = self.__dict__[self.time_field]
        scale = self.time_scale
        if scale is None:
            return to_time_us(value)
        return value * scale if type(value) is int else round(value * scale)

    @classmethod
    def decode(cls, raw: bytes | str) -> Self:
        """An event from the bytes of one JSON object; raises `Undecodable` with the reason."""
        try:
            return cls.__pydantic_validator__.validate_json(raw)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise _undecodable(raw, error) from None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """An event from a dict of values or (from CSV) of strings; raises `Undecodable` with the reason."""
        try:
            return cls.__pydantic_validator__.validate_python(row)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise Undecodable("invalid", describe_faults(error)) from None


def plain_types(annotation: Any) -> set[Any]:
    """The plain types an annotation stands for, without None.

    >>> plain_types(int | None), plain_types(list[float])
    ({<class 'int'>}, {<class 'list'>})
    """
    if hasattr(annotation, "__metadata__"):
        return plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) if part is not type(None) for kind in plain_types(part)}
    return {get_origin(annotation) or annotation}


def _names(kinds: Iterable[Any]) -> str:
    return " | ".join(sorted(getattr(k, "__name__", str(k)) for k in kinds))


def _undecodable(raw: bytes | str, error: ValidationError) -> Undecodable:
    if not raw.strip():
        return Undecodable("empty", "the record is empty")
    if isinstance(raw, bytes):
        try:
            raw.decode()
        except UnicodeDecodeError as wrong:
            return Undecodable("encoding", f"not UTF-8: {wrong.reason} at byte {wrong.start}")
    first = error.errors(include_url=False, include_input=False)[0]["type"]
    return Undecodable("not_json" if first == "json_invalid" else "invalid", describe_faults(error))


def describe_faults(error: ValidationError, values: bool = True) -> str:
    """The first faults in one line: `amount: Input should be a valid number (got 'x')`; without `values` no "got"."""
    parts = []
    for fault in error.errors(include_url=False)[:3]:
        where = ".".join(str(p) for p in fault["loc"]) or "record"
        got = "" if not values or fault["type"] in ("missing", "json_invalid") else f" (got {_short(fault['input'])})"
        parts.append(f"{where}: {fault['msg']}{got}")
    return "; ".join(parts)


def _short(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:  # integers of over 4,300 digits refuse to become text
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def csv_fields(line: bytes) -> list[str]:
    """The cells of one CSV record; raises `Undecodable` when it is not UTF-8 or not CSV."""
    try:
        rows = list(csv.reader(io.StringIO(line.decode(), newline=""), strict=True))
    except UnicodeDecodeError as wrong:
        raise Undecodable("encoding", f"not UTF-8: {wrong.reason} at byte {wrong.start}") from None
    except csv.Error as wrong:
        raise Undecodable("not_csv", str(wrong)) from None
    return rows[0] if rows else []


def csv_row(header: list[str], line: bytes, text_fields: frozenset[str]) -> dict[str, str]:
    """A CSV record as a dict; an empty cell counts as missing, except in a text field."""
    cells = csv_fields(line)
    if not cells:
        raise Undecodable("empty", "the record is empty")
    if len(cells) != len(header):
        raise Undecodable("not_csv", f"{len(cells)} cells, but the header names {len(header)}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell or name in text_fields}


class Message(NamedTuple):
    """A record of Kafka: its value and key (each may be null), its headers, its timestamp (ms since 1970; -1: none)."""

    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp: int = 0


Raw = bytes | Event | dict[str, Any] | Message
"""A record as it was read."""


class Prediction(msgspec.Struct, frozen=True, gc=False, tag_field="record", tag="prediction"):
    """What a named model version said about a question, and from which features.

    `output` is a probability of True (bool labels), a distribution over labels (other classifiers), a value
    (regressors) or a score (anomaly detectors). `version` counts the examples the model had learned.
    `model` names the model and, with one model per key, the key: `LogisticRegression/station=7`.
    """

    id: EventId
    time: datetime
    features: dict[str, Any]
    output: Any
    model: str
    version: int
    late: bool = False


class Outcome(msgspec.Struct, frozen=True, gc=False, tag_field="record", tag="outcome"):
    """A prediction with its label.

    `time` is the question's event time, `label_time` when the label became known, `version` the one that
    predicted, `version_after` the one after learning. `assumed` marks the label of an expired question.
    """

    id: EventId
    time: datetime
    output: Any
    label: Any
    label_time: datetime
    model: str
    version: int
    version_after: int
    assumed: bool = False


class ModelVersion(msgspec.Struct, frozen=True, gc=False, tag_field="record", tag="model"):
    """How far a model has come, reported with the metrics: the examples it has learned, as of an event time."""

    time: datetime
    model: str
    version: int


class Metrics(msgspec.Struct, frozen=True, gc=False, tag_field="record", tag="metrics"):
    """Delayed progressive metrics over all outcomes so far, as of an event time."""

    time: datetime
    outcomes: int
    values: dict[str, float | None]


class Reject(msgspec.Struct, frozen=True, gc=False, tag_field="record", tag="reject"):
    """What could not be used: why (`reason` to count by, `detail` to read), where it was read, its bytes.

    `original` is the record as text, or base64 where `encoding` says so. Of a record of Kafka, `original` is the value
    (null where that was null), and there is more: its `key` (with `key_encoding`, as for `original`), its `headers`
    (values in base64) and its `timestamp` (ms since 1970). `cut` is there where only a part of the record was kept: its
    whole size in bytes.
    """

    reason: str
    detail: str
    place: str
    original: str | None
    encoding: Literal["utf-8", "base64"] = "utf-8"
    key: str | msgspec.UnsetType | None = msgspec.UNSET
    key_encoding: Literal["utf-8", "base64"] | msgspec.UnsetType = msgspec.UNSET
    headers: list[tuple[str, str | None]] | msgspec.UnsetType = msgspec.UNSET
    timestamp: int | msgspec.UnsetType = msgspec.UNSET
    cut: int | msgspec.UnsetType = msgspec.UNSET

    def original_bytes(self) -> bytes:
        """The record as it was read; empty where it was null."""
        return _unpacked(self.original, self.encoding) or b""

    def message(self) -> Message:
        """The record with its key and headers, as Kafka had it; of another source the bytes alone."""
        if self.timestamp is msgspec.UNSET:
            return Message(self.original_bytes())
        assert self.headers is not msgspec.UNSET
        assert self.key is not msgspec.UNSET
        headers = tuple((name, None if value is None else base64.b64decode(value)) for name, value in self.headers)
        key = _unpacked(self.key, self.key_encoding)
        return Message(_unpacked(self.original, self.encoding), key, headers, self.timestamp)


Record = Prediction | Outcome | Metrics | ModelVersion | Reject


def reject(reason: str, detail: str, place: str, raw: Raw) -> Reject:
    """A Reject that keeps the original bytes whatever they are; of objects given in memory, their JSON.

    >>> reject("encoding", "not UTF-8", "a.jsonl:3", b"\\xff").original_bytes()
    b'\\xff'
    >>> reject("invalid", "no such card", "payments/0:7", Message(b"{}", b"c-1", (("trace", b"9"),), 12)).message()
    Message(value=b'{}', key=b'c-1', headers=(('trace', b'9'),), timestamp=12)
    """
    # What quotes text of the user's, or a file's name, may hold lone surrogates, which neither JSON nor UTF-8 knows.
    detail, place = (said.encode(errors="backslashreplace").decode() for said in (detail, place))
    if type(raw) is Message:
        text, encoding = _packed(raw.value)
        key, key_encoding = _packed(raw.key)
        headers = [(name, None if v is None else base64.b64encode(v).decode()) for name, v in raw.headers]
        return Reject(reason, detail, place, text, encoding, key, key_encoding, headers, raw.timestamp)
    text, encoding = _packed(raw_bytes(raw))
    return Reject(reason, detail, place, text, encoding)


def raw_bytes(raw: Raw) -> bytes:
    """A record as bytes: as read, or as JSON for objects given in memory."""
    if isinstance(raw, bytes):
        return raw
    return encode(dict(raw) if isinstance(raw, Event) else raw)[:-1]


def _packed(raw: bytes | None) -> tuple[str | None, Literal["utf-8", "base64"]]:
    if raw is None:
        return None, "utf-8"
    try:
        return raw.decode(), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode(), "base64"


def _unpacked(text: str | None, encoding: str | msgspec.UnsetType) -> bytes | None:
    if text is None:
        return None
    return base64.b64decode(text) if encoding == "base64" else text.encode()


_encoder = msgspec.json.Encoder(enc_hook=str)
_encode: Callable[[Any], bytes] = _encoder.encode


def encode(record: Any) -> bytes:
    """One line of JSON for a record. Infinities and NaN become null, as JSON has none.

    >>> encode(Reject("empty", "the record is empty", "a.jsonl:1", ""))[:29]
    b'{"record":"reject","reason":"'
    """
    try:
        return _encode(record) + b"\n"
    except (OverflowError, TypeError, ValueError):  # integers beyond 64 bits, odd keys, lone surrogates
        return json.dumps(_plain(record)).encode() + b"\n"


def encode_lines(records: list[Any]) -> bytes:
    """The lines of several records at once.

    >>> encode_lines([1, "a"])
    b'1\\n"a"\\n'
    """
    try:
        return _encoder.encode_lines(records)
    except (OverflowError, TypeError, ValueError):
        return b"".join([encode(record) for record in records])


def _plain(value: Any) -> Any:
    """The same in types that the standard library writes as JSON."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        return {"record": value.__struct_config__.tag} | {
            name: _plain(part) for name, part in fields.items() if part is not msgspec.UNSET
        }
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
        return hex(value)  # Python refuses to write so many digits
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
