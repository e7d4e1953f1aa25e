"""Chunks against a dict: what came, went and changed comes back from the rows, and little is written for it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflows.chunks import SIZE, SPAN, Chunks
from features.rows import GONE, Change, MemoryRows


class Kept:
    """Values by number with the chunks behind them, as a holder has them."""

    def __init__(self, rows: MemoryRows | None = None) -> None:
        self.rows = MemoryRows() if rows is None else rows
        self.chunks = Chunks("it")
        self.values: dict[int, Any] = dict(self.chunks.restore(self.rows))
        self.newest = max(self.values, default=0)
        self.written = set(self.values)
        self.gone: list[int] = []
        self.amended: set[int] = set()

    def add(self, gap: int) -> None:
        """One more value, `gap` numbers after the last."""
        self.newest += gap
        self.values[self.newest] = f"value {self.newest}"

    def remove(self, number: int) -> None:
        """A value goes, written or not."""
        del self.values[number]
        self.gone.append(number)

    def amend(self, number: int) -> None:
        """A value becomes another."""
        self.values[number] += "!"
        if number in self.written:
            self.amended.add(number)

    def changes(self) -> list[Change]:
        """What happened since the last time."""
        added = [(number, value) for number, value in self.values.items() if number not in self.written]
        amended = [(number, self.values[number]) for number in self.amended if number in self.values]
        changes = list(self.chunks.changes(added, self.gone, amended))
        self.rows.apply(changes)
        self.written, self.gone, self.amended = set(self.values), [], set()
        return changes


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    rounds=st.lists(
        st.tuples(st.integers(0, 300), st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=8
    ),
    gaps=st.sampled_from([(1,), (1, 2, 5), (1, 1, 300), (1, SPAN - 1, SPAN, SPAN + 1)]),
    oldest_first=st.booleans(),
)
def test_what_is_there_comes_back(
    seed: int, rounds: list[tuple[int, float, float, bool]], gaps: tuple[int, ...], oldest_first: bool
) -> None:
    """After any comings, goings, amendments and rebuildings the rows give what a dict has, and hold no more."""
    rng = Random(seed)
    kept = Kept()
    for come, go, change, rebuild in rounds:
        for _ in range(come):
            kept.add(rng.choice(gaps))
        numbers = list(kept.values)
        for number in rng.sample(numbers, int(len(numbers) * change / 4)):
            kept.amend(number)
        leaving = int(len(numbers) * go)
        for number in numbers[:leaving] if oldest_first else rng.sample(numbers, leaving):
            kept.remove(number)
        kept.changes()
        assert list(Chunks("it").restore(kept.rows)) == sorted(kept.values.items())
        check_rows(kept)
        if rebuild:
            kept = Kept(kept.rows)
    for number in list(kept.values):
        kept.remove(number)
    kept.changes()
    assert kept.rows.empty()


def check_rows(kept: Kept) -> None:
    """No chunk without a value, none too large, no mask or amended value without its own."""
    chunks = [[number for number, _ in parts[0]] for _, parts in kept.rows.scan("it/")]
    assert all(len(chunk) <= SIZE and chunk[-1] - chunk[0] < SPAN for chunk in chunks)
    assert all(any(number in kept.values for number in chunk) for chunk in chunks)
    starts = {f"it-mask/{chunk[0]:016x}" for chunk in chunks}
    assert {key for key, _ in kept.rows.scan("it-mask/")} <= starts
    amended = {int(key.removeprefix("it-amended/"), 16) for key, _ in kept.rows.scan("it-amended/")}
    assert amended <= kept.values.keys()


def test_numbers_may_begin_again_below_those_that_went() -> None:
    """A holder that knows the newest of what is left only gives a number a second time, and gets the second value."""
    kept = Kept()
    for _ in range(5):
        kept.add(1)
    kept.changes()
    kept.amend(5)
    kept.amend(4)
    kept.changes()
    kept.remove(5)
    kept.remove(4)
    kept.changes()
    again = Kept(kept.rows)
    assert again.newest == 3
    again.add(1)
    again.values[4] = "another"
    again.changes()
    assert dict(Chunks("it").restore(kept.rows)) == {1: "value 1", 2: "value 2", 3: "value 3", 4: "another"}
    for number in (1, 2, 3):
        again.remove(number)
    again.changes()
    assert dict(Chunks("it").restore(kept.rows)) == {4: "another"}


def test_removing_what_was_never_there_changes_nothing() -> None:
    """Values that came and went between two calls were never written; neither were numbers beside the chunks."""
    chunks, rows = Chunks("it"), MemoryRows()
    assert list(chunks.changes([], [1, 2, 10**6])) == []
    rows.apply(chunks.changes([(10, "a"), (20, "b")], []))
    assert list(chunks.changes([], [1, 9, 11, 19, 21, 20 + SPAN, 10**12])) == []
    rows.apply(chunks.changes([(40, "c")], [41, 30, 20]))
    assert list(Chunks("it").restore(rows)) == [(10, "a"), (40, "c")]


def test_no_call_writes_what_did_not_change() -> None:
    """Nothing happened: nothing is written, also right after what there is was read."""
    kept = Kept()
    for _ in range(1000):
        kept.add(1)
    kept.changes()
    assert kept.changes() == []
    assert Kept(kept.rows).changes() == []


def test_a_thousand_values_are_four_rows() -> None:
    """Values share rows of up to 256; a value that goes rewrites none of them, its chunk's last takes it away."""
    kept = Kept()
    for _ in range(1000):
        kept.add(1)
    assert len(kept.changes()) == 4
    kept.remove(3)
    kept.remove(700)
    (first, second) = kept.changes()
    assert (first[0], second[0]) == ("it-mask/0000000000000001", "it-mask/0000000000000201")
    assert len(first[2]) + len(second[2]) < 150
    for number in range(513, 769):
        if number != 700:
            kept.remove(number)
    assert [(key, kind) for key, kind, _ in kept.changes()] == [
        ("it/0000000000000201", GONE),
        ("it-mask/0000000000000201", GONE),
    ]


def test_masks_stay_small_however_far_apart_numbers_are() -> None:
    """With models per key a learner sees few of the numbers: a chunk ends before its mask grows."""
    kept = Kept()
    for _ in range(300):
        kept.add(1000)
    kept.changes()
    for number in list(kept.values)[::2]:
        kept.remove(number)
    assert max(len(value) for _, _, value in kept.changes()) < SPAN // 8 + 100


@pytest.mark.parametrize("rebuilt", [False, True])
def test_all_can_be_lost_at_once(rebuilt: bool) -> None:
    """`clear` ends every row that there is, masks and amended values too, and what comes then is kept."""
    kept = Kept()
    for _ in range(600):
        kept.add(1)
    kept.changes()
    kept.remove(7)
    kept.amend(8)
    kept.changes()
    if rebuilt:
        kept = Kept(kept.rows)
    kept.rows.apply(kept.chunks.clear())
    assert kept.rows.empty()
    kept.rows.apply(kept.chunks.changes([(8, "new"), (9, "newer")], []))
    assert list(Chunks("it").restore(kept.rows)) == [(8, "new"), (9, "newer")]


def test_two_names_share_nothing() -> None:
    """Chunks of several names lie in the same rows."""
    rows, one, two = MemoryRows(), Chunks("open"), Chunks("open-er")
    rows.apply(one.changes([(1, "a")], []))
    rows.apply(two.changes([(1, "b"), (2, "c")], []))
    rows.apply(two.changes([], [1], [(2, "d")]))
    assert list(Chunks("open").restore(rows)) == [(1, "a")]
    assert list(Chunks("open-er").restore(rows)) == [(2, "d")]
