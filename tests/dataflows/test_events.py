"""Events: declarations, ids, times, decoding with reasons, and records as lines of JSON."""

from __future__ import annotations

import json
import math
import types
import uuid
from contextlib import closing
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dataflows.connectors import Csv, Memory
from dataflows.events import (
    Event,
    Metrics,
    Outcome,
    Prediction,
    Reject,
    Undecodable,
    csv_row,
    encode,
    raw_bytes,
    reject,
    to_datetime,
    to_time_us,
)
from dataflows.order import EVENT, Reader, Time

NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)
NOON_US = 1_704_110_400_000_000


class Payment(Event, id="id", time="at"):
    id: int
    at: datetime
    amount: float = 0.0
    card: str = ""


class Ticked(Event, time="ts", unit="ms"):
    ts: int


class Measured(Event, time="ts", unit="s"):
    ts: float


class Named(Event, id="name", time="ts", unit="us"):
    name: str
    ts: int


class Unique(Event, id="key", time="ts", unit="us"):
    key: uuid.UUID
    ts: int


def refused(raw: bytes, event: type[Event] = Payment) -> Undecodable:
    """Why bytes are no event."""
    with pytest.raises(Undecodable) as caught:
        event.decode(raw)
    return caught.value


def read_all(event: type[Event], items: list[Any]) -> tuple[list[Any], list[Reject]]:
    """What the reader makes of items given in memory: items and rejects."""
    reader = Reader([(EVENT, Memory(event=event, items=items))], Time())
    taken: list[Any] = []
    refusals: list[Reject] = []
    while not reader.finished:
        batch = reader.next_batch()
        if batch is not None:
            taken += batch.items
            refusals += batch.rejects
    return taken, refusals


# -- times


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (NOON, NOON_US),
        (datetime(2024, 1, 1, 12), NOON_US),  # noqa: DTZ001 - a datetime without a zone is the point
        (datetime(2024, 1, 1, 14, tzinfo=timezone(timedelta(hours=2))), NOON_US),
        ("2024-01-01T12:00:00", NOON_US),
        ("2024-01-01T12:00:00Z", NOON_US),
        ("2024-01-01T12:00:00.000001+00:00", NOON_US + 1),
        (date(2024, 1, 1), NOON_US - 12 * 3_600_000_000),
        (7, 7),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
    ],
)
def test_datetimes_dates_texts_and_integers_become_microseconds(moment: Any, expected: int) -> None:
    """A moment without a zone is taken as UTC, one with a zone is converted, an integer is left as it is."""
    assert to_time_us(moment) == expected


@given(st.datetimes(timezones=st.timezones()))
def test_event_times_survive_the_way_to_microseconds_and_back(moment: datetime) -> None:
    """Every datetime of every zone keeps its moment to the microsecond."""
    expected = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert to_time_us(moment) == expected
    if datetime(2, 1, 1, tzinfo=UTC) < moment < datetime(9998, 1, 1, tzinfo=UTC):
        assert to_datetime(expected) == moment.astimezone(UTC)  # equal moments, also where clocks are set back


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"id":1,"at":"2024-01-01T12:00:00Z"}', NOON_US),
        (b'{"id":1,"at":"2024-01-01T12:00:00"}', NOON_US),
        (b'{"id":1,"at":"2024-01-01 14:00:00+02:00"}', NOON_US),
        (b'{"id":1,"at":1704110400}', NOON_US),
    ],
)
def test_a_datetime_field_takes_text_with_and_without_a_zone(raw: bytes, expected: int) -> None:
    """Datetimes in JSON without a zone are UTC, others are converted."""
    assert Payment.decode(raw).event_time() == expected


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Ticked(ts=12), 12_000),
        (Ticked(ts=-1), -1_000),
        (Ticked(ts=2**60), 2**60 * 1000),
        (Measured(ts=0.1), 100_000),
        (Measured(ts=1_700_000_000.123456), 1_700_000_000_123_456),
        (Named(name="", ts=0), 0),
    ],
)
def test_numbers_count_in_their_declared_unit(event: Event, expected: int) -> None:
    """Integers are scaled exactly, floats to the nearest microsecond."""
    assert event.event_time() == expected


# -- ids


def test_ids_are_integers_or_text() -> None:
    """An int and a str are their own id, a UUID is its text, a class without an id gives None."""
    key = uuid.UUID(int=7)
    assert Payment(id=0, at=NOON).event_id() == 0
    assert Named(name="", ts=1).event_id() == ""
    assert Unique(key=key, ts=1).event_id() == str(key)
    assert Ticked(ts=1).event_id() is None


def test_a_subclass_inherits_id_time_and_unit() -> None:
    """What the base class names holds for its subclasses until they name something else."""

    class Detailed(Ticked):
        note: str = ""

    class Renamed(Detailed, id="note"):
        pass

    assert Detailed(ts=3).event_time() == 3_000
    assert (Renamed(ts=3, note="n").event_id(), Renamed(ts=3).event_time()) == ("n", 3_000)


@pytest.mark.parametrize("missing", [None, "absent"])
def test_an_event_without_its_id_is_never_one_with_the_id_none(missing: str | None) -> None:
    """If ids may be null at all, two events without one are not the same event, nor one called 'None'."""
    try:

        class Loose(Event, id="id", time="ts", unit="us"):
            id: int | None = None
            ts: int
    except TypeError as error:
        if "id" not in str(error):
            raise
        return
    row = {"ts": 1} if missing else {"ts": 1, "id": None}
    items, refusals = read_all(Loose, [row, row])
    assert refusals or [item[2] for item in items] == [None, None]


@pytest.mark.parametrize("kind", [datetime, int])
def test_an_event_without_its_time_does_not_stop_the_reader(kind: type) -> None:
    """If times may be null at all, such an event is a reject and those around it are read."""
    try:

        class Timeless(Event, time="ts", unit="us"):
            ts: kind | None = None  # type: ignore[valid-type]
    except TypeError as error:
        if "ts" not in str(error):
            raise
        return
    items, refusals = read_all(Timeless, [{"ts": 1}, {}, {"ts": 2}])
    assert (len(items), len(refusals)) == (2, 1)


# -- declaration errors


def declare(annotations: dict[str, Any], **keywords: Any) -> type[Event]:
    """An event class made at run time."""
    namespace = {"__annotations__": annotations, "__module__": __name__, "__qualname__": "Wrong"}
    made: type[Event] = types.new_class("Wrong", (Event,), keywords, lambda body: body.update(namespace))
    return made


@pytest.mark.parametrize(
    ("annotations", "keywords", "words"),
    [
        ({"ts": int}, {}, ["Wrong", "no event time", "Hint", "time='FIELD'"]),
        ({"ts": int}, {"time": "when"}, ["Wrong", "'when'", "ts"]),
        ({"ts": int}, {"time": "ts", "unit": None}, ["'ts'", "unknown unit", "Hint", "unit='s'"]),
        ({"ts": int}, {"time": "ts", "unit": "h"}, ["'h'", "ms"]),
        ({"ts": str}, {"time": "ts"}, ["'ts'", "str", "datetime"]),
        ({"ts": date}, {"time": "ts"}, ["'ts'", "date"]),
        ({"ts": bool}, {"time": "ts", "unit": "s"}, ["'ts'", "bool"]),
        ({"ts": int, "n": float}, {"time": "ts", "unit": "s", "id": "n"}, ["'n'", "float", "int, str, UUID"]),
        ({"ts": int, "n": bool}, {"time": "ts", "unit": "s", "id": "n"}, ["'n'", "bool"]),
        ({"ts": int, "n": int | str}, {"time": "ts", "unit": "s", "id": "n"}, ["'n'", "int", "str"]),
        ({"ts": int}, {"time": "ts", "unit": "s", "id": "n"}, ["id='n'", "ts"]),
    ],
)
def test_a_class_that_cannot_serve_is_refused_with_a_hint(
    annotations: dict[str, Any], keywords: dict[str, Any], words: list[str]
) -> None:
    """The message names the class or the field, the value, and what would do."""
    with pytest.raises(TypeError) as caught:
        declare(annotations, **keywords)
    for word in words:
        assert word in str(caught.value)


def test_a_field_may_be_annotated_and_constrained() -> None:
    """Constraints on an id or time field do not hide its type."""

    class Checked(Event, id="id", time="ts", unit="s"):
        id: int = Field(ge=0)
        ts: float = Field(gt=0)

    assert Checked(id=1, ts=0.5).event_time() == 500_000
    assert refused(b'{"id":-1,"ts":1}', Checked).reason == "invalid"


# -- decoding


@pytest.mark.parametrize(
    ("raw", "reason", "words"),
    [
        (b"", "empty", "empty"),
        (b" \t\r", "empty", "empty"),
        (b"{", "not_json", ""),
        (b"nonsense", "not_json", ""),
        (b"[]", "invalid", "record"),
        (b"{}", "invalid", "id: Field required; at: Field required"),
        (b'{"id":"x","at":0}', "invalid", "got 'x'"),
        (b'{"id":1,"at":0,"amount":NaN}', "invalid", "amount"),
        (b'{"id":1,"at":0,"amount":1e999}', "invalid", "amount"),
        (b'{"id":1,"at":0,"card":"\xff"}', "encoding", "byte"),
        (b"\xff\xfe{", "encoding", "byte 0"),
        (b'{"id":true,"at":"tomorrow"}', "invalid", "at"),
    ],
)
def test_bytes_that_are_no_event_have_a_reason_and_a_detail(raw: bytes, reason: str, words: str) -> None:
    """The reason is one of a few codes, the detail names field and value."""
    wrong = refused(raw)
    assert wrong.reason == reason
    assert words in str(wrong)
    assert "\n" not in str(wrong)


def test_details_stay_short() -> None:
    """A huge wrong value is cut in the message, and of many faults three are told."""
    wrong = refused(b'{"id":"' + b"x" * 100_000 + b'","at":[],"amount":[],"card":[]}')
    assert len(str(wrong)) < 500


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(raw: bytes) -> None:
    """Nothing but an event or `Undecodable` with a known reason comes out."""
    try:
        assert isinstance(Payment.decode(raw), Payment)
    except Undecodable as wrong:
        if wrong.reason not in {"empty", "encoding", "not_json", "invalid"}:
            raise


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "at", "amount", "card", "more"]), JSON))
def test_a_row_and_its_json_have_the_same_verdict(row: dict[str, Any]) -> None:
    """What a dict holds is accepted as JSON if it is accepted as a dict and gives the same event."""
    try:
        event = Payment.from_row(row)
    except Undecodable as wrong:
        if wrong.reason != "invalid":
            raise
        return
    assert Payment.decode(json.dumps(row).encode()) == event


def test_unknown_fields_are_ignored_and_events_cannot_be_changed() -> None:
    """An event keeps what it declares, and nobody changes it on the way."""
    event = Payment.decode(b'{"id":1,"at":0,"more":[1]}')
    assert not hasattr(event, "more")
    with pytest.raises(ValueError, match="frozen"):
        event.id = 2


@pytest.mark.parametrize(
    ("line", "reason"), [(b"1,2", "not_csv"), (b"1,2,3,4", "not_csv"), (b'1,"2,3', "not_csv"), (b"", "empty")]
)
def test_csv_rows_that_do_not_fit_the_header_are_refused(line: bytes, reason: str) -> None:
    """Too few or many cells, an open quote and an empty line are told apart."""
    with pytest.raises(Undecodable) as caught:
        csv_row(["a", "b", "c"], line, frozenset())
    assert caught.value.reason == reason


def test_an_empty_csv_cell_is_missing_except_as_text() -> None:
    """No number can be empty, but a text can."""
    assert csv_row(["a", "b", "c"], b"1,,", frozenset({"b"})) == {"a": "1", "b": ""}


def test_an_empty_csv_cell_of_an_aliased_text_field_is_text_too(tmp_path: Any) -> None:
    """Whether a cell is text is told by the name that the header has for the field."""

    class Aliased(Event, time="ts", unit="s"):
        ts: int
        note: str = Field(alias="Note")

    file = tmp_path / "notes.csv"
    file.write_bytes(b"ts,Note\n1,\n")
    with closing(Csv(file, Aliased).open("notes.csv", None, False)) as part:
        ((_, raw),) = part.pull(9)
        event = part.decode(raw)
    assert isinstance(event, Aliased)
    assert event.note == ""


# -- rejects


@given(st.binary())
def test_a_reject_keeps_any_bytes(raw: bytes) -> None:
    """What was read can be had back from the reject, and from its line of JSON."""
    refusal = reject("reason", "detail", "file:1", raw)
    assert refusal.original_bytes() == raw
    line = json.loads(encode(refusal))
    assert Reject(**{k: v for k, v in line.items() if k != "record"}).original_bytes() == raw
    assert line["encoding"] in {"utf-8", "base64"}


ODD_CONTENT = ["\ud800", 10**5000, math.nan, {1, 2}, object, b"\xff", {("a", 1): 2}]
CONTENT_NAMES = ["surrogate", "long", "nan", "set", "class", "bytes", "tuple_key"]


@pytest.mark.parametrize("value", ODD_CONTENT, ids=CONTENT_NAMES)
def test_whatever_a_row_holds_it_can_be_a_reject(value: Any) -> None:
    """A dict from a notebook that is no event is rejected, whatever odd values are in it."""
    _, refusals = read_all(Payment, [{"id": "wrong", "odd": value}])
    assert [r.reason for r in refusals] == ["invalid"]


def test_objects_in_memory_are_shown_as_json() -> None:
    """The original of an event or a dict is the JSON that it would be in a file."""
    assert json.loads(raw_bytes(Named(name="n", ts=1))) == {"name": "n", "ts": 1}
    assert json.loads(raw_bytes({"at": NOON, "x": math.inf})) == {"at": "2024-01-01T12:00:00Z", "x": None}
    assert raw_bytes(b"as it was") == b"as it was"


# -- records as lines


def test_records_are_one_line_of_json_each() -> None:
    """A record says what it is, times are ISO text in UTC."""
    line = encode(Prediction(7, NOON, {"a": 1}, 0.5, "Model", 3))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "record": "prediction",
        "id": 7,
        "time": "2024-01-01T12:00:00Z",
        "features": {"a": 1},
        "output": 0.5,
        "model": "Model",
        "version": 3,
        "late": False,
    }
    assert json.loads(encode(Outcome(7, NOON, 0.5, False, NOON, "Model", 3, 4)))["label"] is False
    assert json.loads(encode(Metrics(NOON, 1, {"MAE": None})))["values"] == {"MAE": None}


ODD_NUMBERS = [2**64, -(10**40), math.nan, math.inf, Decimal("1.5"), True]
ODD_VALUES = [*ODD_NUMBERS, uuid.UUID(int=1), NOON, date(2024, 1, 1), None]


@pytest.mark.parametrize("odd", ODD_VALUES)
@pytest.mark.parametrize("beside", [0, 2**70])
def test_odd_values_are_written_the_same_on_both_roads(odd: Any, beside: int) -> None:
    """A value looks alike whether or not something beside it needs the slow encoder; NaN and infinity are null."""
    shown = json.loads(encode(Prediction(1, NOON, {"odd": odd, "beside": beside}, odd, "M", 0)))
    alone = json.loads(encode(Prediction(1, NOON, {"odd": odd}, odd, "M", 0)))
    assert shown["features"]["odd"] == alone["features"]["odd"]
    assert shown["features"]["beside"] == beside
    assert shown["time"] == alone["time"] == "2024-01-01T12:00:00Z"
    if isinstance(odd, float):
        assert shown["output"] is None


@pytest.mark.parametrize("labels", [[True, False], [0, 1], ["a", "b"], [1.5, 2.5], [("a", 1), None]])
def test_distributions_over_any_labels_are_written(labels: list[Any]) -> None:
    """The keys of a distribution become text whatever they are."""
    line = encode(Prediction(1, NOON, {}, dict.fromkeys(labels, 0.5), "M", 0))
    assert json.loads(line)["output"] == {str(label): 0.5 for label in labels}


def test_integers_too_long_for_python_to_print_are_written() -> None:
    """Beyond 4,300 digits Python refuses to print integers; a record with one is still written."""
    assert encode(Prediction(1, NOON, {"long": 10**5000}, 0.5, "M", 0)).endswith(b"\n")


ANYTHING = st.none() | st.integers() | st.floats() | st.text()


@given(st.recursive(ANYTHING, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_features_are_written_as_valid_json(value: Any) -> None:
    """Whatever numbers and texts come, the line is JSON that a strict parser reads."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(encode(Prediction("x", NOON, {"value": value}, value, "M", 0)), parse_constant=refuse)
