"""What admit remembers under a bound, against plain ordered dicts, through any number of rebuildings."""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.remembered import EarlyLabels, Remembered
from features.rows import MemoryRows

KEYS = st.integers(0, 12) | st.sampled_from(["", "1", (1, "a"), None])
VALUES = st.sampled_from([None, (True,), (0,), ("",)])


@settings(max_examples=150)
@given(
    steps=st.lists(st.tuples(KEYS, VALUES, st.sampled_from(["", "", "keep", "rebuild"])), max_size=60),
    limit=st.integers(0, 15),
)
def test_the_newest_keys_are_remembered(steps: list[tuple[Any, Any, str]], limit: int) -> None:
    """A key keeps its place and gets the newest value; beyond the bound the oldest goes, and is counted."""
    rows = MemoryRows()
    remembered = Remembered("ids", limit, rows)
    expected: OrderedDict[Any, Any] = OrderedDict()
    for key, value, action in steps:
        forgotten = 0
        expected[key] = value
        while len(expected) > limit:
            expected.popitem(last=False)
            forgotten += 1
        assert remembered.add(key, value) == forgotten
        if action:
            rows.apply(remembered.changes())
            assert list(remembered.changes()) == []
        if action == "rebuild":
            remembered = Remembered("ids", limit, rows)
        assert list(remembered.numbers) == list(expected)
        for known in {*expected, "never seen", key}:
            assert remembered.get(known, "unknown") == expected.get(known, "unknown")


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_bound_that_is_lower_now_holds_at_once(limit: int) -> None:
    """Rebuilt with room for fewer, the newest stay; the rows lose the others with the next changes."""
    rows = MemoryRows()
    before = Remembered("ids", 100, rows)
    for key in range(50):
        before.add(key, (key,))
    rows.apply(before.changes())
    now = Remembered("ids", limit, rows)
    assert list(now.numbers) == list(range(50))[50 - limit :]
    rows.apply(now.changes())
    later = Remembered("ids", 100, rows)
    assert list(later.numbers) == list(now.numbers)
    assert all(later.get(key, None) == (key,) for key in now.numbers)


def test_a_bound_that_is_higher_now_leaves_room() -> None:
    """What was forgotten stays so, what comes is added."""
    rows = MemoryRows()
    before = Remembered("ids", 3, rows)
    for key in "abcde":
        before.add(key)
    rows.apply(before.changes())
    now = Remembered("ids", 5, rows)
    assert [now.add(key) for key in "fgh"] == [0, 0, 1]
    assert list(now.numbers) == list("defgh")


def test_without_rows_nothing_is_noted() -> None:
    """A run that keeps nothing must not pay for it: no lists that grow."""
    remembered = Remembered("ids", 2)
    early = EarlyLabels()
    for key in range(100):
        remembered.add(key)
        remembered.add(key, (1,))
        early.keep(key, True, key, "labels:1", b"")
        early.keep(key, False, key, "labels:2", b"")
        early.pop(key)
    assert (remembered._forgotten, remembered._revised, early._gone, early._revised) == ([], set(), [], set())


class NaiveLabels:
    """Labels in the order in which their question was first named."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Any, list[Any]] = OrderedDict()

    def keep(self, match: Any, value: Any, time: int) -> None:
        first = self.entries[match][2] if match in self.entries else time
        self.entries[match] = [value, time, first]

    def first_came(self) -> float:
        return next(iter(self.entries.values()))[2] if self.entries else inf


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["keep", "keep", "keep", "pop", "pop first"]),
            st.integers(0, 7),
            st.booleans(),
            st.sampled_from(["", "", "keep", "rebuild"]),
        ),
        max_size=60,
    )
)
def test_labels_wait_in_the_order_in_which_they_came(steps: list[tuple[str, int, bool, str]]) -> None:
    """A newer label for the same question keeps the place; each is taken once, by its question or as the oldest."""
    rows = MemoryRows()
    early, naive = EarlyLabels(rows), NaiveLabels()
    for time, (verb, match, value, action) in enumerate(steps):
        if verb == "keep":
            early.keep(match, value, time, f"labels:{time}", f"{time}".encode())
            naive.keep(match, value, time)
        elif verb == "pop" and match in naive.entries:
            value, came, first = naive.entries.pop(match)
            assert early.pop(match)[:5] == (value, came, f"labels:{came}", f"{came}".encode(), first)
        elif verb == "pop first" and naive.entries:
            oldest, (value, came, first) = naive.entries.popitem(last=False)
            found, entry = early.pop_first()
            assert (found, entry[0], entry[1], entry[4]) == (oldest, value, came, first)
        if action:
            rows.apply(early.changes())
            assert list(early.changes()) == []
        if action == "rebuild":
            early = EarlyLabels(rows)
        assert early.entries.keys() == naive.entries.keys()
        assert early.first_came() == naive.first_came()
    while naive.entries:
        assert early.pop_first()[0] == naive.entries.popitem(last=False)[0]
    rows.apply(early.changes())
    assert rows.empty()


def test_labels_that_were_taken_leave_nothing_behind() -> None:
    """While the first one waits, any number of others may come and be taken: no list grows with them."""
    early = EarlyLabels(MemoryRows())
    early.keep("first", True, 0, "labels:0", b"")
    for time in range(1, 1000):
        early.keep(time, True, time, f"labels:{time}", b"")
        early.pop(time)
    assert len(early._order) <= 20
    assert early.first_came() == 0
    early.keep("last", False, 1000, "labels:1000", b"")
    rows = MemoryRows()
    rows.apply(early.changes())
    again = EarlyLabels(rows)
    assert [again.pop_first()[0] for _ in range(2)] == ["first", "last"]


def test_what_is_cleared_is_forgotten_for_good() -> None:
    """Nothing is left of it, in the rows neither, and what comes later is remembered as ever."""
    rows = MemoryRows()
    remembered = Remembered("models", 3, rows)
    for key in "abc":
        remembered.add(key)
    rows.apply(remembered.changes())
    remembered.clear()
    assert [remembered.add(key) for key in "bde"] == [0, 0, 0]
    rows.apply(remembered.changes())
    assert list(Remembered("models", 3, rows).numbers) == list(remembered.numbers) == list("bde")


def test_a_number_given_twice_does_not_mix_labels_up() -> None:
    """Rebuilt after its newest was taken, numbers begin again below it: the old label does not come back."""
    rows = MemoryRows()
    early = EarlyLabels(rows)
    for match in "abc":
        early.keep(match, True, 1, f"labels:{match}", b"")
    rows.apply(early.changes())
    early.keep("c", False, 2, "labels:c2", b"")
    rows.apply(early.changes())
    early.pop("c")
    rows.apply(early.changes())
    again = EarlyLabels(rows)
    again.keep("d", True, 3, "labels:d", b"")
    rows.apply(again.changes())
    last = EarlyLabels(rows)
    assert [last.pop_first()[0] for _ in range(3)] == ["a", "b", "d"]
