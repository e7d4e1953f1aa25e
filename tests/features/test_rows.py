"""State as rows: their keys, rows in memory, and entities that come and go between rows and a small memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import Count, Entity, EntityFeatures, Last, Lifetime, Max, Mean, NUnique, Session, Sum, Tumbling
from features.rows import APPEND, GONE, PUT, Change, MemoryRows, key_of, key_text, put

from .naive import NaiveFeatures
from .streams import Step, play, streams

PARTS = (
    st.none()
    | st.integers()
    | st.text(st.characters(codec=None, exclude_categories=()))
    | st.sampled_from(["", "7", "null", '"', '"a', "\\", '["a"]', "\ud800", "a\0b", "-1", "true"])
)
KEYS = PARTS | st.tuples(PARTS) | st.tuples(PARTS, PARTS)


@given(st.lists(KEYS, min_size=2, max_size=6))
def test_different_keys_never_share_a_text(keys: list[Any]) -> None:
    """Text, numbers, None and tuples of them have a text that any database takes, and come back from it."""
    texts = [key_text(key) for key in keys]
    assert [key_of(text) for text in texts] == keys
    assert [type(key_of(text)) for text in texts] == [type(key) for key in keys]
    for (key, text), (other, other_text) in combinations(zip(keys, texts, strict=True), 2):
        assert (text == other_text) == (key == other)
    assert all(text.encode() for text in texts)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["a", "a/1", "a/2", "b", "ab", "\U0010fffe"]), st.sampled_from([PUT, APPEND, GONE])),
    max_size=30,
)


@given(CHANGES)
def test_rows_in_memory_are_those_that_were_given(changes: list[tuple[str, int]]) -> None:
    """A row is its last PUT and what was added to it since; GONE ends it, and ends nothing where there is none."""
    rows, expected = MemoryRows(), dict[str, list[int]]()
    for number, (key, kind) in enumerate(changes):
        if kind == APPEND and key not in expected:
            continue  # no holder adds to what is not there
        rows.apply([(key, kind, b"" if kind == GONE else pickle.dumps(number))])
        if kind == PUT:
            expected[key] = [number]
        elif kind == APPEND:
            expected[key].append(number)
        else:
            expected.pop(key, None)
    assert rows.empty() == (not expected)
    for prefix in ("", "a", "a/", "b", "\U0010fffe", "c"):
        assert list(rows.scan(prefix)) == sorted((k, v) for k, v in expected.items() if k.startswith(prefix))
    assert all(rows.get(key) == expected.get(key, []) for key in ("a", "a/1", "b", "c"))


def test_adding_to_a_row_that_is_not_there_is_an_error() -> None:
    """What lost its beginning would be read as something else later."""
    with pytest.raises(KeyError):
        MemoryRows().apply([("a", APPEND, b"")])


def test_put_keeps_one_object() -> None:
    """As one part, that replaces what was there."""
    rows = MemoryRows()
    rows.apply([put("a", 1), put("a", {"x": None})])
    assert rows.get("a") == [{"x": None}]


# -- entities between rows and memory

WINDOWS: list[Any] = [10, Last(3), "lifetime", Session(4), Tumbling(12)]


def declaration(**more: Any) -> Entity:
    """Windows of all kinds."""
    return Entity("k", [Count(), Sum("x"), Max("x")], **({"over": WINDOWS} | more))


class Copied(MemoryRows):
    """Rows that a reader asks for; counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def get(self, key: str) -> list[Any]:
        self.asked += 1
        return super().get(key)


DECLARATIONS = {
    "for ever": declaration(),
    "mortal": declaration(ttl=25),
    "forgotten by its windows": declaration(over=[10, Tumbling(12), Session(4)]),
    "distinct": Entity("k", [NUnique("x", limit=2), Mean("x")], over=[Lifetime(), 10], ttl=12),
}


@pytest.mark.parametrize("name", DECLARATIONS)
@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=25)
@given(drawn=st.data(), cache=st.integers(1, 3))
def test_a_small_memory_changes_no_answer(name: str, lateness: int, cache: int, drawn: st.DataObject) -> None:
    """With room for one to three entities, swept and rebuilt now and then, they answer as those that never leave."""
    steps = drawn.draw(streams(lateness, keys=6, most=60))
    rows = MemoryRows()
    small = EntityFeatures(DECLARATIONS[name], lateness, rows=rows, cache=cache)
    clock = steps[0].t
    answers = []
    for step in steps:
        clock = max(clock, step.t)
        answers += play(small, [step])
        action = drawn.draw(st.sampled_from(["", "", "sweep", "keep", "keep", "keep and sweep", "rebuild"]))
        if "keep" in action or action == "rebuild":
            rows.apply(small.changes())
            small.trim()
        if "sweep" in action:
            small.sweep(clock)
        if action == "rebuild":
            small = EntityFeatures(DECLARATIONS[name], lateness, rows=rows, cache=cache)
    assert repr(answers) == repr(play(EntityFeatures(DECLARATIONS[name], lateness), steps))
    assert answers == play(NaiveFeatures(DECLARATIONS[name]), steps)


@pytest.mark.parametrize("name", ["mortal", "forgotten by its windows", "distinct"])
@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=25)
@given(drawn=st.data(), cache=st.sampled_from([1, 2, 100]))
def test_rows_of_entities_past_their_time_may_go(name: str, lateness: int, cache: int, drawn: st.DataObject) -> None:
    """Rows that at a checkpoint equal those of one never seen may be deleted; what comes later is whole without."""
    steps = drawn.draw(streams(lateness, keys=4, most=60))
    mortal = DECLARATIONS[name]
    assert mortal.forget_after_us is not None
    rows = MemoryRows()
    features = EntityFeatures(mortal, lateness, rows=rows, cache=cache)
    newest: dict[str, int] = {}
    clock = checkpoint = steps[0].t
    answers = []
    for step in steps:
        clock = max(clock, step.t)
        answers += play(features, [step])
        if drawn.draw(st.booleans()):
            kept = list(features.changes())
            rows.apply(kept)
            features.trim()
            checkpoint = clock
            for key in {key for key, *_ in kept}:
                newest[key] = max(one.t for one in steps if key_text(one.key) == key and one.t <= clock)
        if drawn.draw(st.booleans()):
            gone = [key for key, t in newest.items() if t + mortal.forget_after_us + lateness < checkpoint]
            rows.apply([(key, GONE, b"") for key in gone])
            for key in gone:
                del newest[key]
        if drawn.draw(st.booleans()):
            features.sweep(clock)
    assert repr(answers) == repr(play(EntityFeatures(mortal, lateness), steps))


def sizes(features: EntityFeatures, rows: MemoryRows, keys: Iterator[int]) -> list[int]:
    """Entities in memory after each round of ten."""
    found = []
    for t, key in enumerate(keys):
        features.observe(key, t, (1.0,))
        if t % 10 == 9:
            rows.apply(features.changes())
            features.trim()
            found.append(len(features))
    return found


def test_memory_is_bounded() -> None:
    """Five thousand entities, room for fifty: never more of them in memory, and all of them are in the rows."""
    rows = MemoryRows()
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=rows, cache=50)
    assert max(sizes(features, rows, iter(range(5000)))) <= 60  # and the ten of a round
    assert sum(1 for _ in rows.scan("")) == 5000
    assert [features.read(key, 6000) for key in (0, 2500, 4999)] == [(1.0,)] * 3


def test_what_is_in_use_stays_in_memory() -> None:
    """Entities that come again and again are not fetched again and again."""
    rows = Copied()
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=rows, cache=50)
    sizes(features, rows, (t % 5 if t % 2 else t for t in range(4000)))
    before = rows.asked
    sizes(features, rows, (t % 5 if t % 2 else 10_000 + t for t in range(1000)))
    assert rows.asked - before <= 500 + 5  # each new one is looked for once, the five at the most once


def test_new_entities_are_not_looked_for_while_all_are_in_memory() -> None:
    """Rows are asked only for what may be there: not in a new state, before anything had to go."""
    rows = Copied()
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=rows, cache=10_000)
    sizes(features, rows, iter(range(1000)))
    assert rows.asked == 0


def test_nothing_leaves_memory_before_it_is_in_its_row() -> None:
    """`trim` lets go of nothing as long as anything is unsaved; `sweep` leaves those that are."""
    features = EntityFeatures(Entity("k", [Sum("x")], ttl=5), rows=MemoryRows(), cache=1)
    for key in range(10):
        features.observe(key, key, (1.0,))
    features.trim()
    features.trim()
    assert (len(features), features.unsaved) == (10, 10)
    assert features.sweep(10**6) == 0
    assert len(list(features.changes())) == 10
    assert (features.unsaved, features.sweep(10**6), len(features)) == (0, 10, 0)


def test_reading_writes_nothing() -> None:
    """Neither a read entity nor one that was looked for in vain is a change."""
    rows = MemoryRows()
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=rows)
    features.observe("a", 0, (1.0,))
    rows.apply(features.changes())
    again = EntityFeatures(Entity("k", [Sum("x")]), rows=rows)
    assert (again.read("a", 1), again.read("b", 1)) == ((1.0,), (0.0,))
    assert (list(again.changes()), len(again)) == ([], 1)


def test_a_refused_value_writes_nothing() -> None:
    """What raised and changed nothing is in no row."""
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=MemoryRows())
    with pytest.raises(TypeError, match="'x'"):
        features.observe("a", 0, ("one",))
    assert (list(features.changes()), features.unsaved, len(features)) == ([], 0, 0)


def test_values_are_kept_as_they_were_taken() -> None:
    """A Decimal was taken as the float that it is; so it comes back, to the last bit."""
    from decimal import Decimal

    rows = MemoryRows()
    features = EntityFeatures(Entity("k", [Sum("x"), Last("x")]), rows=rows)
    features.observe("a", 0, (Decimal("0.1"),))
    rows.apply(features.changes())
    assert EntityFeatures(Entity("k", [Sum("x"), Last("x")]), rows=rows).read("a", 1) == features.read("a", 1)


def kinds(changes: Iterator[Change]) -> list[int]:
    """What becomes of each row."""
    return [kind for _, kind, _ in changes]


def test_an_entity_is_added_to_until_it_is_written_whole() -> None:
    """First its events, then more of them; whole once there are many parts, and added to again."""
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=MemoryRows())
    found = []
    for t in range(20):
        features.observe("a", t, (1.0,))
        found += kinds(features.changes())
    assert found == [PUT, *[APPEND] * 7, PUT, *[APPEND] * 7, PUT, *[APPEND] * 3]


def test_steps_of_the_same_key_are_one_row() -> None:
    """However many events an entity had since the last time, it has one change."""
    features = EntityFeatures(Entity("k", [Sum("x")]), rows=MemoryRows())
    play(features, [Step("observe", "a", t, {"x": 1.0}) for t in range(5)])
    play(features, [Step("observe", "b", 6, {"x": 1.0})])
    assert [key for key, *_ in features.changes()] == ['"a', '"b']
