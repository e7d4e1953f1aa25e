"""What the learner does is noted as flat values, and read as entries again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataflows.learnlog import ASKED, FAILED, OUTCOME, PROTOTYPE, LearnLog, entries_of
from features.rows import key_text


def test_notes_come_back_as_entries_in_their_order() -> None:
    """Questions, failed ones, outcomes: each with its fields; outputs only of those that were answered."""
    log = LearnLog(("a",), every=5)
    log.asked(1, None, "x", 10, (1.0,), 0, False, 0.5)
    log.failed(2, "k", "y", 11, {"a": 2.0}, 0, True)
    log.learned(1, None, True, 12, False)
    assert len(log) == 3
    chunk = log.take()
    assert entries_of(chunk.fields) == [
        (ASKED, 1, None, "x", 10, (1.0,), 0, False, 0),
        (ASKED, 2, "k", "y", 11, {"a": 2.0}, 0, True, FAILED),
        (OUTCOME, 1, None, True, 12, False, 0),
    ]
    assert chunk.outputs == [0.5]


def test_a_keyframe_knows_how_many_entries_came_before() -> None:
    """Its place counts within its chunk, from nothing again after each take."""
    log = LearnLog(("a",), every=1)
    log.prototype(b"p", 0)
    log.asked(1, "k", "x", 10, (1.0,), 0, False, 0.5)
    log.keyframe("k", 1, {"w": 1})
    assert [(f.place, f.key, f.examples) for f in log.take().frames] == [(0, PROTOTYPE, 0), (1, key_text("k"), 1)]
    log.keyframe("k", 2, {"w": 2})
    assert len(log) == 1
    assert [f.place for f in log.take().frames] == [0]
    assert len(log) == 0


KEYS = st.none() | st.integers() | st.text() | st.lists(st.text(max_size=2), min_size=1).map(tuple)


@given(KEYS)
def test_no_key_is_taken_for_the_prototype(key: object) -> None:
    """Not even the text that it is called by."""
    assert key_text(key) != PROTOTYPE
    assert key_text(PROTOTYPE) != PROTOTYPE
