"""Features that were added to a declaration later: the old go on, the new begin, as one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import Count, Entity, EntityFeatures, First, Last, Max, Mean, NUnique, Session, Sum
from features.parts import FeatureParts

from .streams import Step, play, streams

OLD = Entity("k", [Count(), Sum("x"), First("tag")], over=["lifetime", 10])
NEW = Entity("k", [Max("x"), Sum("x"), NUnique("tag"), Count()], over=[10, "lifetime", Session(4)])
STAY = tuple(name for name in OLD.feature_names if name in NEW.feature_names)
COME = tuple(name for name in NEW.feature_names if name not in STAY)


def together(old: EntityFeatures, new: EntityFeatures) -> FeatureParts:
    """What is declared now, of what there was and what began."""
    return FeatureParts(NEW, [(old, STAY), (new, COME)])


def named(features: Any, steps: list[Step]) -> list[dict[str, Any]]:
    """The answers by name of the feature."""
    return [
        {} if row is None else dict(zip(features.names, row, strict=True)) for row in play(WithColumns(features), steps)
    ]


class WithColumns:
    """Has the columns that `play` asks for; those of parts are the declaration's."""

    def __init__(self, features: Any) -> None:
        self.columns = NEW.columns if isinstance(features, FeatureParts) else features.columns
        self.ask, self.observe, self.read = features.ask, features.observe, features.read


@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=40)
@given(drawn=st.data())
def test_the_old_go_on_and_the_new_begin(lateness: int, drawn: st.DataObject) -> None:
    """The old features are those over all events, the new those over the events since they were added."""
    steps = drawn.draw(streams(lateness))
    cut = drawn.draw(st.integers(0, len(steps)))
    old = EntityFeatures(OLD, lateness)
    play(old, steps[:cut])
    both = together(old, EntityFeatures(NEW, lateness))
    expected_old = named(EntityFeatures(OLD, lateness), steps)[cut:]
    expected_new = named(EntityFeatures(NEW, lateness), steps[cut:])
    for answer, before, after in zip(named(both, steps[cut:]), expected_old, expected_new, strict=True):
        if answer:
            assert tuple(answer) == NEW.feature_names
            # First("tag") is asked no more, but its column is still there for NUnique.
            wanted = {name: before[name] for name in STAY} | {name: after[name] for name in COME}
            assert repr(answer) == repr({name: wanted[name] for name in NEW.feature_names})


def test_the_first_answer_of_a_new_feature_is_that_of_an_empty_window() -> None:
    """Nobody was seen by what was added just now."""
    old = EntityFeatures(OLD)
    for t in range(5):
        old.observe("a", t, (1.0, "x"))
    answer = dict(zip(NEW.feature_names, together(old, EntityFeatures(NEW)).read("a", 5), strict=True))
    assert {name: answer[name] for name in ("count_by_k", "x_sum_by_k")} == {"count_by_k": 5, "x_sum_by_k": 5.0}
    assert {answer[name] for name in COME} == {None, 0}
    assert answer["x_max_by_k"] is None


def test_a_column_that_nobody_declares_any_more_is_missing() -> None:
    """A part made for more than is asked still takes events; what it counted of the lost field stays as it was."""
    before = Entity("k", [Sum("x"), Sum("gone")])
    now = Entity("k", [Sum("x")])
    part = EntityFeatures(before)
    part.observe("a", 0, (1.0, 5.0))
    left = FeatureParts(now, [(part, now.feature_names)])
    assert left.ask("a", 1, (2.0,)) == (3.0,)
    assert part.read("a", 2) == (3.0, 5.0)


def test_parts_of_three_times_answer_in_the_declared_order() -> None:
    """Added to twice, in whatever order the declaration names them now."""
    declarations = [Entity("k", [each]) for each in (Count(), Sum("x"), Mean("x"))]
    parts = [EntityFeatures(each) for each in declarations]
    now = Entity("k", [Mean("x"), Count(), Sum("x")])
    for number, part in enumerate(parts):
        for t in range(number, 3):
            part.observe("a", t, (float(t),) * len(part.columns))
    three = FeatureParts(now, [(part, part.names) for part in parts])
    assert three.names == now.feature_names
    assert three.read("a", 3) == (2.0, 3, 3.0)
    assert three.ask("a", 4, (5.0,)) == (3.5, 4, 8.0)


def test_sweeping_and_counting_go_over_all_parts() -> None:
    """Each part forgets and has unsaved changes of its own."""
    from features.rows import MemoryRows

    parts = [EntityFeatures(Entity("k", [each], over=5), rows=MemoryRows()) for each in (Sum("x"), Last("x"))]
    now = Entity("k", [Sum("x"), Last("x")], over=5)
    both = FeatureParts(now, [(part, part.names) for part in parts])
    both.observe("a", 0, (1.0,))
    both.observe("b", 0, (1.0,))
    assert (both.unsaved, both.sweep(100)) == (4, 0)
    for part in parts:
        assert len(list(part.changes())) == 2
    assert (both.unsaved, both.sweep(100)) == (0, 4)
