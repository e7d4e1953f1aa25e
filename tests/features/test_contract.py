"""What everything that holds state must do: resume, be pure when read, be bounded, reject without a trace."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import (
    Count,
    Entity,
    EntityFeatures,
    First,
    Last,
    Lifetime,
    Max,
    Mean,
    MostFrequent,
    NUnique,
    Quantile,
    Session,
    Sliding,
    Sum,
    Tiled,
    Var,
    Window,
    history,
)
from features.accumulators import Heap
from features.rows import MemoryRows
from features.windows import refusal

from .naive import NaiveFeatures
from .streams import AGGREGATES, WINDOWS, Step, play, streams


def state(features: EntityFeatures) -> bytes:
    """All that is held of all entities."""
    return pickle.dumps((features._young, features._old), pickle.HIGHEST_PROTOCOL)


ALL = tuple(over for over in WINDOWS if not isinstance(over, Lifetime))
IN_ALL = tuple(each for each in AGGREGATES if all(refusal(each, over) is None for over in WINDOWS))
EVERYTHING = Entity("k", IN_ALL, over=WINDOWS)


def entity(over: Window) -> Entity:
    """All aggregates that work over a window."""
    return Entity("k", [each for each in AGGREGATES if refusal(each, over) is None], over=over)


@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=40)
@given(drawn=st.data())
def test_many_windows_together_come_in_the_declared_order(lateness: int, drawn: st.DataObject) -> None:
    """Exact and folded windows of one entity are put together by aggregate, then by window."""
    steps = drawn.draw(streams(lateness, most=20))
    declaration = Entity("k", [Count(), Sum("x"), First("tag")], over=WINDOWS[::-1])
    assert play(EntityFeatures(declaration, lateness), steps) == play(NaiveFeatures(declaration), steps)


@pytest.mark.parametrize("over", WINDOWS, ids=lambda over: over.label or "lifetime")
@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=15)
@given(drawn=st.data())
def test_rows_continue_to_the_last_bit(over: Window, lateness: int, drawn: st.DataObject) -> None:
    """Kept anywhere in the stream, in one part or many, rows answer the rest as the original does."""
    steps = drawn.draw(streams(lateness))
    cut = drawn.draw(st.integers(0, len(steps)))
    rows = MemoryRows()
    straight = EntityFeatures(entity(over), lateness, rows=rows)
    for step in steps[:cut]:
        play(straight, [step])
        if drawn.draw(st.booleans()):
            rows.apply(straight.changes())
    rows.apply(straight.changes())
    resumed = EntityFeatures(entity(over), lateness, rows=rows)
    assert repr(play(resumed, steps[cut:])) == repr(play(straight, steps[cut:]))


@pytest.mark.parametrize("over", WINDOWS, ids=lambda over: over.label or "lifetime")
@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=15)
@given(drawn=st.data())
def test_a_pickled_entity_continues_to_the_last_bit(over: Window, lateness: int, drawn: st.DataObject) -> None:
    """Written whole, as rows are once in a while, each entity's pickle answers the rest as the entity does."""
    steps = drawn.draw(streams(lateness))
    cut = drawn.draw(st.integers(0, len(steps)))
    straight = EntityFeatures(entity(over), lateness)
    play(straight, steps[:cut])
    resumed = EntityFeatures(entity(over), lateness)
    resumed._young = pickle.loads(pickle.dumps(straight._young))
    assert repr(play(resumed, steps[cut:])) == repr(play(straight, steps[cut:]))
    assert len(resumed) == len(straight)


@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=60)
@given(drawn=st.data())
def test_trimming_changes_no_answer(lateness: int, drawn: st.DataObject) -> None:
    """Histories trimmed as early as can be answer like the oracle, which forgets nothing."""
    over = drawn.draw(st.lists(st.sampled_from((Sliding(3), Sliding(10), Last(1), Last(4))), min_size=1, unique=True))
    aggregates = [Sum("x"), Var("x"), Max("x"), First("tag"), Last("tag"), NUnique("tag"), MostFrequent("tag")]
    declaration = Entity("k", aggregates, over=over)
    steps = drawn.draw(streams(lateness, keys=1, most=60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "TRIM_FROM", 1)
        got = play(EntityFeatures(declaration, lateness), steps)
    assert got == play(NaiveFeatures(declaration), steps)


@pytest.mark.parametrize("over", WINDOWS, ids=lambda over: over.label or "lifetime")
@settings(max_examples=15)
@given(drawn=st.data())
def test_reading_changes_nothing(over: Window, drawn: st.DataObject) -> None:
    """Reads between the events, even far ahead, leave answers and state as they are without them."""
    steps = [step for step in drawn.draw(streams()) if step.verb != "read"]
    plain, read = EntityFeatures(entity(over)), EntityFeatures(entity(over))
    for step in steps:
        assert repr(play(plain, [step])) == repr(play(read, [step]))
        for ahead in drawn.draw(st.lists(st.integers(0, 40), max_size=3)):
            read.read(drawn.draw(st.integers(0, 2)), step.t + ahead)
        assert state(read) == state(plain)
    assert len(read) == len(plain)


@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=60)
@given(drawn=st.data())
def test_ttl_does_not_depend_on_when_entities_are_swept(lateness: int, drawn: st.DataObject) -> None:
    """An entity not seen for longer than its ttl starts from nothing, swept or not."""
    steps = drawn.draw(streams(lateness))
    ttl = drawn.draw(st.integers(10, 25))
    declaration = Entity("k", [Count(), Sum("x"), Last("tag")], over=["lifetime", Last(3), 10, Session(4)], ttl=ttl)
    features = EntityFeatures(declaration, lateness)
    newest = steps[0].t
    got = []
    for step in steps:
        newest = max(newest, step.t)
        if drawn.draw(st.booleans()):
            features.sweep(newest)
        got += play(features, [step])
    assert got == play(NaiveFeatures(declaration), steps)


@settings(max_examples=40)
@given(drawn=st.data())
def test_without_ttl_entities_go_once_no_window_can_tell(drawn: st.DataObject) -> None:
    """Windows that end make an entity forgettable; sweeping changes no answer."""
    steps = drawn.draw(streams())
    declaration = Entity("k", IN_ALL, over=[over for over in ALL if over.reach_us is not None])
    swept, kept = EntityFeatures(declaration), EntityFeatures(declaration)
    for step in steps:
        swept.sweep(step.t)
        assert repr(play(swept, [step])) == repr(play(kept, [step]))
    swept.sweep(steps[-1].t + 1000)
    assert len(swept) == 0


def test_sweep_says_how_many_went() -> None:
    """Only entities whose last event is further back than ttl and lateness are forgotten."""
    features = EntityFeatures(Entity("k", [Count()], ttl=10), lateness=5)
    features.observe("old", 0, ())
    features.observe("new", 1, ())
    assert (features.sweep(15), features.sweep(16), features.sweep(16), len(features)) == (0, 1, 0, 1)


def test_lifetime_without_ttl_is_never_swept() -> None:
    """What is asked to last for ever does."""
    features = EntityFeatures(Entity("k", [Count()]))
    features.observe("a", 0, ())
    assert features.sweep(10**18) == 0
    assert features.read("a", 10**18) == (1,)


@pytest.mark.parametrize("value", ["12", "", b"1", [1], {}, float("nan"), float("inf"), Decimal("nan"), 10**400, 1j])
@pytest.mark.parametrize("lateness", [0, 5])
def test_a_value_that_is_no_number_is_refused_without_a_trace(value: Any, lateness: int) -> None:
    """The error names the field and the value; nothing has been observed, not even a new entity."""
    features = EntityFeatures(Entity("k", [Count(), Mean("y"), Sum("x")], over=[10, "lifetime", Last(2)]), lateness)
    features.observe("a", 0, (1.0, 2.0))
    before = state(features)
    for key in ("a", "b"):
        with pytest.raises((TypeError, ValueError), match="field 'x'"):
            features.ask(key, 1, (1.0, value))
    assert state(features) == before
    assert len(features) == 1


def test_a_value_that_cannot_be_counted_is_refused() -> None:
    """NUnique and MostFrequent need hashable values that equal themselves."""
    features = EntityFeatures(Entity("k", [NUnique("tag")], over=10))
    for value in ([1], float("nan")):
        with pytest.raises((TypeError, ValueError), match="field 'tag'"):
            features.observe("a", 0, (value,))
    assert len(features) == 0


def test_other_number_types_are_taken() -> None:
    """Decimal and bool count as the numbers they are."""
    features = EntityFeatures(Entity("k", [Sum("x"), Max("x")]))
    features.observe("a", 0, (Decimal("1.5"),))
    assert features.ask("a", 0, (True,)) == (2.5, 1.5)


def size(features: EntityFeatures) -> int:
    """Bytes of state."""
    return len(state(features))


def test_memory_of_sliding_windows_follows_the_window() -> None:
    """Ten thousand events later an entity is no larger than after two hundred, reckoned with the room to trim."""
    features = EntityFeatures(
        Entity("k", [Count(), Mean("x"), Max("x"), NUnique("x")], over=[20, Last(10)]), lateness=5
    )
    sizes = []
    for t in range(10_000):
        features.ask("a", t, (t % 7 + 0.1,))
        sizes.append(size(features) if t in (200, 1_000) or t > 9_900 else 0)
    assert max(sizes[9_900:]) < 4 * sizes[200]


def test_memory_of_tiles_and_sessions_does_not_grow() -> None:
    """However many events come, tiles and accumulators stay as many."""
    over: list[Window | str] = [Tiled(100, resolution=10), Session(5), "lifetime"]
    features = EntityFeatures(Entity("k", [Count(), Mean("x"), Max("x"), Quantile("x")], over=over), lateness=5)
    for t in range(300):
        features.ask("a", t, (t % 7 + 0.1,))
    before = size(features)
    for t in range(300, 10_000):
        features.ask("a", t, (t % 7 + 0.1,))
    assert size(features) < before * 1.2


def test_nunique_stops_at_its_limit() -> None:
    """A lifetime of distinct values holds no more than the limit."""
    features = EntityFeatures(Entity("k", [NUnique("x", limit=5)]))
    answers = [features.ask("a", t, (t,)) for t in range(100)]
    assert answers[-1] == (5,)
    before = size(features)
    features.observe("a", 100, (100,))
    assert size(features) == before


def test_cost_does_not_grow_with_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moving aggregate is given each value once and gives it back once, however long its window."""
    calls = 0

    def counted(method: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return method(*args)

        return call

    monkeypatch.setattr(Heap, "add", counted(Heap.add))
    monkeypatch.setattr(Heap, "remove", counted(Heap.remove))
    for length in (10, 1_000):
        calls = 0
        features = EntityFeatures(Entity("k", [Max("x")], over=length))
        for t in range(3_000):
            features.ask("a", t, (t * 7919 % 1000,))
        assert calls <= 2 * 3_000


def test_falsy_values_are_values() -> None:
    """0, False and "" are first and last values; None is not."""
    features = EntityFeatures(Entity("k", [First("x"), Last("x")], over=["lifetime", 10], of="events"))
    features.observe("a", 0, (None,))
    features.observe("a", 1, ("",))
    features.observe("a", 2, (False,))
    assert features.ask("a", 3, (None,)) == ("", "", False, False)


def test_late_events_are_inserted_at_their_place() -> None:
    """A late question sees what came before it in time, and later ones see it."""
    features = EntityFeatures(Entity("k", [Count(), Last("x")], over=[10, "lifetime"]), lateness=10)
    play(features, [Step("observe", 0, 10, {"x": "b"})])
    assert features.ask(0, 5, ("a",)) == (1, 1, "a", "a")
    assert features.read(0, 10) == (2, 2, "b", "b")
