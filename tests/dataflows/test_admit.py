"""Admit, mostly through `Job.play`: which questions are asked, and which label answers them when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import dummy, stats

from dataflows import DISCARD, Event, Job, JobError, Label, Outcome, Prediction, Reject, Time
from dataflows.admit import Admit
from dataflows.connectors import Memory
from dataflows.order import LABEL, Batch, Reader
from dataflows.replay import PlainRun, inputs_of
from features import Count, Derived, Entity, Fields, Mean
from features.rows import MemoryRows
from tests.contracts.shelves import FileShelf


class Ask(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    key: str | None = "k"
    x: float = 0.0
    wait: str = "0s"
    y: float | None = None


class Tell(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: float | None = None


class Said(Event, time="t", unit="us"):
    """A label that knows its question by entity and time only."""

    t: int
    key: str | None = "k"
    of: int
    y: float


def mean() -> Any:
    """Predicts the mean of what it learned."""
    return dummy.StatisticRegressor(stats.Mean())


def job(label: Label, event: type[Event] = Ask, **more: Any) -> Job:
    """A small job."""
    declared: dict[str, Any] = {"features": [Fields("x")], "model": mean()} | more
    return Job(name="admit", events=Memory(event=event, items=[]), label=label, **declared)


def by_stream(event: type[Event] = Tell, **more: Any) -> Label:
    """A label that is a stream of its own."""
    return Label(Memory(event=event, items=[]), **({"field": "y"} | more))


def run(job: Job, *inputs: Any) -> tuple[list[Any], PlainRun]:
    """The records of a run and the run itself, whose counters may be looked at."""
    plain = PlainRun(job, Reader(inputs_of(job, *inputs), job.time))
    return list(plain.run()), plain


def outcomes(records: Iterable[Any]) -> list[tuple[Any, ...]]:
    """(id, label, moment it was known in µs, whether assumed) of each outcome."""
    return [
        (r.id, r.label, (r.label_time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1), r.assumed)
        for r in records
        if isinstance(r, Outcome)
    ]


def rejects(records: Iterable[Any]) -> list[tuple[str, str]]:
    """(reason, place) of each reject."""
    return [(r.reason, r.place) for r in records if isinstance(r, Reject)]


def answered(records: Iterable[Any]) -> list[Any]:
    """Ids of the questions that were answered."""
    return [r.id for r in records if isinstance(r, Prediction)]


# -- a field of the same event


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (5, [(1, 1.0, 15, False), (2, 2.0, 17, False)]),
        (0, [(1, 1.0, 10, False), (2, 2.0, 12, False)]),
        ("wait", [(2, 2.0, 13_012, False), (1, 1.0, 20_010, False)]),
        (lambda event: 30 - event.t, [(1, 1.0, 30, False), (2, 2.0, 30, False)]),
        (timedelta(microseconds=5), [(1, 1.0, 15, False), (2, 2.0, 17, False)]),
    ],
)
def test_a_field_is_revealed_after_a_constant_a_field_or_a_function(delay: Any, expected: list[Any]) -> None:
    """The label is known `delay` after its question, each question with its own; ties in the order of questions."""
    rows = [{"id": 1, "t": 10, "y": 1, "wait": "20ms"}, {"id": 2, "t": 12, "y": 2, "wait": "13ms"}]
    records, _ = run(job(Label(field="y", delay=delay)), rows)
    assert outcomes(records) == expected


def test_a_label_due_at_the_time_of_a_question_is_known_before_it() -> None:
    """A question at t is answered by a model that has learned all labels due at or before t."""
    rows = [{"id": i, "t": 10 * i, "y": i} for i in range(4)]
    records, _ = run(job(Label(field="y", delay=10)), rows)
    assert [(r.id, r.version, r.output) for r in records if isinstance(r, Prediction)] == [
        (0, 0, 0.0), (1, 1, 0.0), (2, 2, 0.5), (3, 3, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (20, [(1, 1.0, 30, False)]),
        (21, [(1, -1, 31, True)]),
    ],
)
def test_the_horizon_is_inclusive_for_fields(delay: int, expected: list[Any]) -> None:
    """A label at exactly the horizon is in time; one later is replaced by the assumed one when the horizon is over."""
    records, _ = run(job(Label(field="y", delay=delay, horizon=20, otherwise=-1)), [{"id": 1, "t": 10, "y": 1}])
    assert outcomes(records) == expected


def test_a_field_without_a_value_is_assumed_at_the_horizon_or_discarded() -> None:
    """None is no label: the question waits for its horizon, and without one it is forgotten and counted."""
    rows = [{"id": 1, "t": 10, "y": None}, {"id": 2, "t": 11, "y": 0}]
    records, _ = run(job(Label(field="y", delay=1, horizon=5, otherwise=7)), rows)
    assert outcomes(records) == [(2, 0.0, 12, False), (1, 7, 16, True)]
    records, plain = run(job(Label(field="y", delay=1)), rows)
    assert outcomes(records) == [(2, 0.0, 12, False)]
    assert plain.admit.counts["unlabelled"] == 1
    assert len(plain.admit) == len(plain.learner) == 0


@pytest.mark.parametrize("delay", ["wait", lambda event: 1 // 0, lambda event: None, lambda event: -5])
def test_a_delay_that_cannot_be_had_rejects_the_event(delay: Any) -> None:
    """A user's function that fails, or gives no duration or a negative one, spoils its event and nothing else."""
    rows = [{"id": 1, "t": 10, "y": 1, "wait": "a while"}]
    records, _ = run(job(Label(field="y", delay=delay)), rows)
    assert rejects(records) == [("function_error", "events:1")]
    assert answered(records) == []


class Ride(Event, id="id", time="start"):
    id: int
    start: datetime
    duration: int


def test_the_taxi_timetable_of_river_simulate_qa() -> None:
    """The 12 events of the docstring of `river.stream.simulate_qa`: departures and arrivals in its order."""
    departures = [datetime(2020, 1, 1, 20, minute, tzinfo=UTC) for minute in (0, 10, 20, 45, 50, 55)]
    seconds = [900, 1800, 300, 400, 240, 450]
    rows = [{"id": i, "start": s, "duration": d} for i, (s, d) in enumerate(zip(departures, seconds, strict=True))]
    declared = Job(
        name="taxis",
        events=Memory(event=Ride, items=[]),
        features=[Derived(minute)],
        model=mean(),
        label=Label(field="duration", delay=lambda ride: timedelta(seconds=ride.duration)),
    )
    records = list(declared.play(rows))
    timetable = [
        (f"{r.label_time:%H:%M:%S}", r.id, r.label) if isinstance(r, Outcome) else (f"{r.time:%H:%M:%S}", r.id)
        for r in records
        if isinstance(r, Prediction | Outcome)
    ]
    assert timetable == [
        ("20:00:00", 0),
        ("20:10:00", 1),
        ("20:15:00", 0, 900),
        ("20:20:00", 2),
        ("20:25:00", 2, 300),
        ("20:40:00", 1, 1800),
        ("20:45:00", 3),
        ("20:50:00", 4),
        ("20:51:40", 3, 400),
        ("20:54:00", 4, 240),
        ("20:55:00", 5),
        ("21:02:30", 5, 450),
    ]


def minute(ride: Ride) -> int:
    """A feature."""
    return ride.start.minute


# -- a stream of labels


def test_labels_of_a_stream_answer_by_id() -> None:
    """Each label answers its own question at its own time, in any order."""
    asks = [{"id": 1, "t": 1}, {"id": 2, "t": 2}, {"id": 3, "t": 50}]
    tells = [{"id": 2, "t": 5, "y": 20}, {"id": 1, "t": 7, "y": 10}, {"id": 3, "t": 60, "y": 30}]
    records, _ = run(job(by_stream()), asks, tells)
    assert outcomes(records) == [(2, 20.0, 5, False), (1, 10.0, 7, False), (3, 30.0, 60, False)]
    assert rejects(records) == []


@pytest.mark.parametrize(("at", "late"), [(110, False), (111, True)])
def test_the_horizon_is_inclusive_for_streams(at: int, late: bool) -> None:
    """At exactly the horizon a label is in time; a microsecond later it is a `late_label` and the other is assumed."""
    records, _ = run(job(by_stream(horizon=100, otherwise=-1)), [{"id": 1, "t": 10}], [{"id": 1, "t": at, "y": 5}])
    assert outcomes(records) == ([(1, -1, 111, True)] if late else [(1, 5.0, 110, False)])
    assert rejects(records) == ([("late_label", "labels:1")] if late else [])


@pytest.mark.parametrize("otherwise", [DISCARD, 0, False, "", None])
def test_an_expired_question_is_discarded_or_answered_with_whatever_is_declared(otherwise: Any) -> None:
    """0, False, "" and None may be assumed; only `DISCARD` learns nothing. A later label is late either way."""
    asks, tells = [{"id": 1, "t": 0}, {"id": 2, "t": 50}], [{"id": 1, "t": 50, "y": 1}]
    model = dummy.NoChangeClassifier()
    records, plain = run(job(by_stream(horizon=10, otherwise=otherwise), model=model), asks, tells)
    expected = [] if otherwise is DISCARD else [(1, otherwise, 11, True), (2, otherwise, 61, True)]
    assert outcomes(records) == expected
    assert [type(o[1]) for o in outcomes(records)] == [type(o[1]) for o in expected]
    assert rejects(records) == [("late_label", "labels:1")]
    assert len(plain.admit) == len(plain.learner) == 0
    assert plain.admit.counts["expired"] == 2


class Loose(Event, id="id", time="t", unit="us"):
    id: int
    t: int
    y: int | bool | str | float | None = None


FALSY = st.sampled_from([0, False, "", 0.0, 1, True, "a"])


@given(st.lists(FALSY, min_size=1, max_size=5), st.sampled_from(["field", "stream", "later"]))
def test_falsy_labels_are_labels(labels: list[Any], kind: str) -> None:
    """0, False, "" and 0.0 are learned like all others, in all three kinds."""
    model = dummy.NoChangeClassifier()
    features = [Derived(one)]
    rows = [{"id": i, "t": 10 * i, "y": y} for i, y in enumerate(labels)]
    if kind == "field":
        declared = job(Label(field="y", delay=1), Loose, model=model, features=features)
        records, _ = run(declared, rows)
    elif kind == "stream":
        declared = job(by_stream(Loose), Loose, model=model, features=features)
        records, _ = run(declared, rows, [r | {"t": r["t"] + 1} for r in rows])
    else:
        declared = job(Label(field="y", after=10, by="one"), Loose, model=model, features=features)
        records, _ = run(declared, rows)
        labels = labels[1:]
    found = [r.label for r in records if isinstance(r, Outcome)]
    assert [(type(y), y) for y in found] == [(type(y), y) for y in labels]


def one(event: Event) -> int:
    """The same key for all."""
    return 1


def test_a_label_of_none_is_missing() -> None:
    """A null label is a reject of its own kind and its question still waits."""
    tells = [{"id": 1, "t": 2}, {"id": 1, "t": 3, "y": 0}]
    records, _ = run(job(by_stream()), [{"id": 1, "t": 1}], tells)
    assert rejects(records) == [("label_missing", "labels:1")]
    assert outcomes(records) == [(1, 0.0, 3, False)]


def test_an_early_label_waits_for_its_question() -> None:
    """It answers as soon as the question is asked, after the prediction was made."""
    asks = [{"id": 1, "t": 10}, {"id": 2, "t": 11}]
    records, plain = run(job(by_stream(early="1d")), asks, [{"id": 1, "t": 4, "y": 3}])
    assert [type(r).__name__ for r in records[:3]] == ["Prediction", "Outcome", "Prediction"]
    assert outcomes(records) == [(1, 3.0, 10, False)]
    assert [r.version for r in records if isinstance(r, Prediction)] == [0, 1]
    assert plain.admit.counts["early_labels"] == 1


def test_an_early_label_waits_as_long_as_declared_and_is_an_orphan_then() -> None:
    """At exactly `early` it still answers; a microsecond later it is rejected with its bytes and place."""
    tells = [{"id": 1, "t": 10, "y": 1}, {"id": 2, "t": 9, "y": 2}]
    asks = [{"id": 1, "t": 60}, {"id": 2, "t": 60}]
    records, _ = run(job(by_stream(early=50)), asks, sorted(tells, key=lambda r: r["t"]))
    assert outcomes(records) == [(1, 1.0, 60, False)]
    assert rejects(records) == [("orphan_label", "labels:1")]


def test_labels_without_a_question_are_orphans_at_the_end() -> None:
    """The end of input tells that no question will come."""
    records, _ = run(job(by_stream()), [{"id": 1, "t": 1}], [{"id": 7, "t": 2, "y": 1}, {"id": 8, "t": 3, "y": 1}])
    assert rejects(records) == [("orphan_label", "labels:1"), ("orphan_label", "labels:2")]


def test_a_second_label_is_a_duplicate_or_a_revision() -> None:
    """After the answer the same label is a duplicate, another a revision; both are rejects, learned is one."""
    tells = [{"id": 1, "t": t, "y": y} for t, y in ((2, 0), (3, 0), (4, 1))]
    records, _ = run(job(by_stream()), [{"id": 1, "t": 1}], tells)
    assert outcomes(records) == [(1, 0.0, 2, False)]
    assert rejects(records) == [("duplicate_label", "labels:2"), ("label_revision", "labels:3")]


@pytest.mark.parametrize(("revisions", "expected"), [("first", (3.0, 11)), ("last", (5.0, 111))])
def test_the_first_or_the_last_label_counts(revisions: Any, expected: tuple[float, int]) -> None:
    """Rewards 3, 4, 5 arrive at 11, 12 and 13: `first` learns 3 at once, `last` 5 when the horizon ends; each once."""
    tells = [{"id": 1, "t": t, "y": y} for t, y in ((11, 3), (12, 4), (13, 5))]
    label = by_stream(revisions=revisions, horizon=100, otherwise=0)
    records, plain = run(job(label), [{"id": 1, "t": 10}, {"id": 2, "t": 20}], tells)
    # Nothing arrived for the second: the default.
    assert outcomes(records) == [(1, *expected, False), (2, 0, 121, True)]
    assert plain.learner.models()[None][1] == 2
    refused = ["label_revision", "label_revision"] if revisions == "first" else []
    assert [reason for reason, _ in rejects(records)] == refused


def test_a_revision_after_the_horizon_comes_too_late() -> None:
    """With `last` the label known at the horizon is learned; one after it is told apart from one without a question."""
    tells = [{"id": 1, "t": 20, "y": 1}, {"id": 1, "t": 111, "y": 2}]
    records, _ = run(job(by_stream(revisions="last", horizon=100)), [{"id": 1, "t": 10}], tells)
    assert outcomes(records) == [(1, 1.0, 111, False)]
    assert rejects(records) == [("label_revision", "labels:2")]


def test_early_revisions_of_a_question_that_never_comes_are_not_lost() -> None:
    """With `last`, the last of the early labels that answer nothing is an orphan, and none is kept for ever."""
    tells = [{"id": 7, "t": 1, "y": 1}, {"id": 7, "t": 2, "y": 2}]
    records, plain = run(job(by_stream(revisions="last", horizon=100)), [{"id": 1, "t": 1}], tells)
    assert ("orphan_label", "labels:2") in rejects(records)
    assert plain.admit.counts["rejected_by_admit"] == len(rejects(records))
    rows = MemoryRows()
    again = Admit(job(by_stream(revisions="last", horizon=100)), rows=rows)
    again.admit(Batch(1, [(t, LABEL, 7, "labels", t, Tell(id=7, t=t, y=t), b"") for t in (1, 2)], [], None, False))
    rows.apply(again.changes())
    assert rows.get("early/0000000000000001") != []
    again.admit(Batch(2, [], [], None, True))
    rows.apply(again.changes())
    assert [key for key, _ in rows.scan("early")] == []


def test_early_revisions_with_last_take_the_last() -> None:
    """Of several labels before the question the last one counts."""
    tells = [{"id": 1, "t": 1, "y": 1}, {"id": 1, "t": 2, "y": 2}]
    records, _ = run(job(by_stream(revisions="last", horizon=100)), [{"id": 1, "t": 5}], tells)
    assert outcomes(records) == [(1, 2.0, 106, False)]


# -- matched by entity and time


def test_labels_match_by_entity_and_time() -> None:
    """`on` names the entity and `at` the question's time; every question of both is answered, others are not."""
    label = by_stream(Said, on="key", at="of")
    asks = [{"id": i, "t": t, "key": k} for i, (t, k) in enumerate([(1, "a"), (1, "b"), (1, "a"), (2, "a")])]
    tells = [{"t": 3, "key": "a", "of": 1, "y": 5}, {"t": 4, "key": "c", "of": 1, "y": 6}]
    records, _ = run(job(label), asks, tells)
    assert outcomes(records) == [(0, 5.0, 3, False), (2, 5.0, 3, False)]
    assert rejects(records) == [("orphan_label", "labels:2")]


def test_pushing_one_question_out_leaves_another_of_the_same_match_open() -> None:
    """Two questions share entity and time; the bound pushes the first out, the label still answers the second."""
    label = by_stream(Said, on="key", at="of", max_open=1)
    asks = [{"id": 1, "t": 1}, {"id": 2, "t": 1}]
    records, _ = run(job(label), asks, [{"t": 3, "of": 1, "y": 5}])
    assert outcomes(records) == [(2, 5.0, 3, False)]
    assert rejects(records) == []


class Texted(Event, time="t", unit="us"):
    t: int
    key: str
    of: str
    y: float


class Seconds(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    key: str = "k"
    x: float = 0.0


class TellSeconds(Event, time="t", unit="s"):
    t: int
    key: str = "k"
    of: int
    y: float


def test_a_label_whose_time_cannot_be_read_does_not_stop_the_job() -> None:
    """A text that is no time in the field that `at` names is refused with the job, or its label is a reject."""
    try:
        declared = job(by_stream(Texted, on="key", at="of"))
    except JobError as error:
        if "'of'" not in str(error):
            raise
        return
    records, _ = run(declared, [{"id": 1, "t": 1}], [{"t": 2, "key": "k", "of": "yesterday", "y": 1}])
    assert len(rejects(records)) == 1


def test_a_numeric_time_that_labels_name_counts_in_their_unit() -> None:
    """With times in seconds on both sides, a label of second 5 answers the question of second 5."""
    declared = job(by_stream(TellSeconds, on="key", at="of"), Seconds)
    records, _ = run(declared, [{"id": 1, "t": 5}], [{"t": 7, "of": 5, "y": 1}])
    assert [o[:2] for o in outcomes(records)] == [(1, 1.0)]


# -- a later event of the same entity


def test_a_later_event_of_the_entity_answers() -> None:
    """The first event of the same key at least `after` later gives the label; ones without a value do not."""
    rows = [
        {"id": 1, "t": 0, "key": "a", "y": 1},
        {"id": 2, "t": 5, "key": "a", "y": 2},
        {"id": 3, "t": 9, "key": "b", "y": 3},
        {"id": 4, "t": 10, "key": "a", "y": None},
        {"id": 5, "t": 12, "key": "a", "y": 4},
        {"id": 6, "t": 15, "key": "a", "y": 5},
    ]
    records, _ = run(job(Label(field="y", after=10, by="key")), rows)
    assert outcomes(records) == [(1, 4.0, 12, False), (2, 5.0, 15, False)]


def test_a_later_event_answers_before_it_asks() -> None:
    """The event that reveals a label is itself answered by a model that learned from it."""
    records, _ = run(job(Label(field="y", after=10, by="key")), [{"id": i, "t": 10 * i, "y": i} for i in range(3)])
    assert [(r.id, r.version) for r in records if isinstance(r, Prediction)] == [(0, 0), (1, 1), (2, 2)]


def test_a_horizon_bounds_the_wait_for_a_later_event() -> None:
    """No event within the horizon: the assumed label, at the horizon."""
    rows = [{"id": 1, "t": 0, "y": 1}, {"id": 2, "t": 30, "y": 2}]
    records, _ = run(job(Label(field="y", after=10, by="key", horizon=20, otherwise=-1)), rows)
    assert outcomes(records) == [(1, -1, 21, True), (2, -1, 51, True)]


def test_questions_without_a_key_await_no_later_event() -> None:
    """None is no entity: such a question answers nothing and is answered by nothing."""
    rows = [{"id": i, "t": 10 * i, "key": None, "y": i} for i in range(3)]
    records, _ = run(job(Label(field="y", after=10, by="key")), rows)
    assert outcomes(records) == []
    assert answered(records) == [0, 1, 2]


def test_a_late_question_is_answered_by_the_first_event_after_its_own_time() -> None:
    """In arrival order too, the first event at least `after` later gives the label, whatever was asked before."""
    rows = [
        {"id": 1, "t": 10, "y": 0},
        {"id": 2, "t": 5, "y": 0},
        {"id": 3, "t": 16, "y": 1},
        {"id": 4, "t": 20, "y": 2},
    ]
    declared = job(Label(field="y", after=10, by="key"), time=Time(order="arrival", lateness=10))
    records, _ = run(declared, rows)
    assert outcomes(records) == [(2, 1.0, 16, False), (1, 2.0, 20, False)]


# -- events


def test_an_event_id_is_processed_once() -> None:
    """The second event of an id is a reject, whatever else it says."""
    rows = [{"id": 0, "t": 1, "y": 1}, {"id": 0, "t": 2, "y": 5}, {"id": 1, "t": 3, "y": 1}]
    records, _ = run(job(Label(field="y", delay=1)), rows)
    assert answered(records) == [0, 1]
    assert rejects(records) == [("duplicate_event", "events:2")]


@pytest.mark.parametrize(("max_ids", "expected"), [(0, 3), (1, 3), (2, 2)])
def test_ids_are_remembered_up_to_a_bound(max_ids: int, expected: int) -> None:
    """Beyond `max_ids` the oldest is forgotten, counted, and its duplicate is taken as new."""
    rows = [{"id": id, "t": t, "y": 1} for t, id in enumerate((1, 2, 1))]
    records, plain = run(job(Label(field="y", delay=1), max_ids=max_ids), rows)
    assert len(answered(records)) == expected
    assert plain.admit.counts["ids_forgotten"] == expected - max_ids


class Anonymous(Event, time="t", unit="us"):
    t: int
    x: float = 0.0
    y: float = 0.0


def test_events_without_ids_are_named_by_their_place() -> None:
    """The partition and offset serve as id, and equal events are all processed."""
    records, _ = run(job(Label(field="y", delay=0), Anonymous), [{"t": 1}, {"t": 1}])
    assert answered(records) == ["events:1", "events:2"]


@pytest.mark.parametrize("where", ["derived", "filter", "key"])
def test_a_function_of_the_user_that_fails_rejects_its_event(where: str) -> None:
    """One event that a Derived, a where= or a derived key cannot take is a reject; those around it are answered."""

    def fragile(event: Any) -> Any:
        return 1 / (event.id - 2)

    features: dict[str, Any] = {
        "derived": [Fields("x"), Derived(fragile)],
        "filter": [Entity("key", [Count()], over="1h", where=lambda event: bool(fragile(event)))],
        "key": [Fields("x"), Derived(fragile, feature=False), Entity("fragile", [Count()], over="1h")],
    }
    rows = [{"id": i, "t": i, "y": i} for i in (1, 2, 3)]
    records, _ = run(job(Label(field="y", delay=0), features=features[where]), rows)
    assert answered(records) == [1, 3]
    assert rejects(records) == [("function_error", "events:2")]
    assert "ZeroDivisionError" in next(r.detail for r in records if isinstance(r, Reject))


# -- bounds


@pytest.mark.parametrize("kind", ["field", "stream", "later"])
def test_no_more_questions_wait_than_declared(kind: str) -> None:
    """Beyond `max_open` the oldest question expires early and is counted, in all three kinds."""
    rows = [{"id": i, "t": i, "y": 1} for i in range(5)]
    kinds = {
        "field": Label(field="y", delay=1000, max_open=2, horizon=2000, otherwise=-1),
        "stream": by_stream(max_open=2, horizon=1000, otherwise=-1),
        "later": Label(field="y", after=1000, by="key", max_open=2, horizon=2000, otherwise=-1),
    }
    declared = job(kinds[kind])
    plain = PlainRun(declared, Reader(inputs_of(declared, rows, [] if kind == "stream" else None), declared.time, 1))
    most, records = 0, []
    for record in plain.run():
        records.append(record)
        most = max(most, len(plain.admit)) if len(answered(records)) < 5 else most
    assert most <= 2
    assert plain.admit.counts["open_over_bound"] == 3
    assert [o[:2] for o in outcomes(records)][:3] == [(0, -1), (1, -1), (2, -1)]


def test_a_label_that_came_is_not_lost_when_its_question_is_pushed_out() -> None:
    """With `last`, a question pushed out before its horizon is answered with the label it has by then."""
    label = by_stream(revisions="last", horizon=1000, otherwise=-1, max_open=1)
    records, _ = run(job(label), [{"id": 1, "t": 1}, {"id": 2, "t": 10}], [{"id": 1, "t": 5, "y": 3}])
    assert outcomes(records)[0] == (1, 3.0, 10, False)


def test_no_more_early_labels_wait_than_declared() -> None:
    """Beyond `max_early` the oldest is an orphan at once; the others still answer."""
    tells = [{"id": i, "t": i, "y": i} for i in (1, 2, 3)]
    records, _ = run(job(by_stream(max_early=2)), [{"id": i, "t": 10} for i in (1, 2, 3)], tells)
    assert rejects(records) == [("orphan_label", "labels:1")]
    assert [o[0] for o in outcomes(records)] == [2, 3]


def test_answered_labels_are_remembered_up_to_the_bound_of_ids() -> None:
    """Beyond `max_ids` closed questions are forgotten: a duplicate label is then an orphan, still a reject."""
    asks = [{"id": i, "t": i} for i in (1, 2)]
    tells = [{"id": 1, "t": 3, "y": 1}, {"id": 2, "t": 4, "y": 1}, {"id": 1, "t": 5, "y": 1}]
    records, _ = run(job(by_stream(), max_ids=1), asks, tells)
    assert rejects(records) == [("orphan_label", "labels:3")]


# -- the end, and what labels are for


def test_the_end_of_input_reveals_and_expires_what_is_open() -> None:
    """Labels due later are revealed in their order, questions without any expire, nothing stays open."""
    rows = [{"id": 1, "t": 1, "y": 1}, {"id": 2, "t": 2, "y": None}, {"id": 3, "t": 3, "y": 3}]
    records, plain = run(job(Label(field="y", delay=100, horizon=200, otherwise=0)), rows)
    assert outcomes(records) == [(1, 1.0, 101, False), (3, 3.0, 103, False), (2, 0, 203, True)]
    assert len(plain.admit) == len(plain.learner) == 0


def test_label_features_see_a_label_at_the_moment_it_is_revealed() -> None:
    """A target mean counts a label from its reveal on, an assumed one too, and never before."""
    features = [Entity("key", [Count(), Mean("y")], over="1h", of="labels")]
    asks = [{"id": i, "t": t} for i, t in enumerate((0, 4, 5, 14, 15, 16))]
    records, _ = run(job(by_stream(horizon=10, otherwise=3), features=features), asks, [{"id": 0, "t": 5, "y": 1}])
    seen = [tuple(r.features.values()) for r in records if isinstance(r, Prediction)]
    assert seen == [(0, 0.0), (0, 0.0), (1, 1.0), (1, 1.0), (2, 2.0), (3, 7 / 3)]


@pytest.mark.parametrize("order", ["event_time", "arrival"])
def test_a_label_read_late_is_seen_by_features_from_when_it_was_read(order: Any) -> None:
    """A label behind the watermark answers its question and counts in label features afterwards, without a fault."""
    features = [Entity("key", [Count(), Mean("y")], over="1h", of="labels")]

    def steps() -> Any:
        for t in range(20):
            yield {"id": t, "t": t}

    declared = job(by_stream(), features=features, time=Time(order=order))
    # The label of 10 at 11 is in the file behind that of 0 at 15: read when the clock is at 15.
    tells = [{"id": 0, "t": 15, "y": 1}, {"id": 10, "t": 11, "y": 3}]
    records, _ = run(declared, list(steps()), tells)
    assert rejects(records) == []
    assert {o[0]: o[1] for o in outcomes(records)} == {0: 1.0, 10: 3.0}
    last = [r for r in records if isinstance(r, Prediction)][-1]
    assert tuple(last.features.values()) == (2, 2.0)


def test_nothing_is_lost() -> None:
    """Every label read is an outcome or a reject, every event an answer or a reject, for a stream of all mishaps."""
    asks = [{"id": i % 17, "t": i} for i in range(40)]
    tells = [{"id": i % 23, "t": 2 * i, "y": i % 3 or None} for i in range(30)]
    label = by_stream(horizon=9, early=5, max_open=3, max_early=2)
    records, plain = run(job(label, max_ids=8), asks, tells)
    kinds = Counter(type(r).__name__ for r in records)
    label_rejects = [place for _, place in rejects(records) if place.startswith("labels")]
    assert kinds["Prediction"] + len(rejects(records)) - len(label_rejects) == 40
    assert kinds["Outcome"] + len(label_rejects) == 30
    assert len(set(rejects(records))) == len(rejects(records))
    assert plain.admit.counts["rejected_by_admit"] == len(rejects(records))


def test_models_of_another_per_do_not_count_any_more(tmp_path: Path) -> None:
    """When `per` changes, as many models may begin as are declared; those of a job that goes on count."""
    label = Label(field="y", delay=5)
    shelf = FileShelf(tmp_path / "state", frozenset())

    def refused(per: Any, ids: Iterable[int], number: int) -> list[int]:
        nonlocal shelf
        declared = job(label, per=per, max_models=2)
        admit = Admit(declared, rows=shelf.rows("admit"))
        rows = [{"id": id, "t": id, "key": "ab"[id % 2]} for id in ids]
        batch = Reader(inputs_of(declared, rows), declared.time).next_batch()
        assert batch is not None
        work = admit.admit(batch)
        shelf.write(number, "admit", admit.changes(), True)
        shelf.commit(number)
        shelf = shelf.again()
        assert {reject.reason for reject in work.rejects} <= {"too_many_models"}
        return [int(reject.place.split(":")[1]) for reject in work.rejects]

    assert refused("key", (1, 2, 3), 1) == []
    assert refused("id", (11, 12, 13), 2) == [3]
    assert refused("id", (21, 22), 3) == [1, 2]
    assert refused("key", (31, 32, 33), 4) == []
    assert refused(None, (41, 42, 43), 5) == []
    assert refused("id", (51, 52, 53), 6) == [3]
    shelf.close()
