"""EntityFeatures against the oracle, and the contract of everything that holds state."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import Entity, EntityFeatures, EWMean, Quantile, Window
from features.aggregates import Aggregate
from features.windows import refusal

from .naive import NaiveFeatures
from .streams import AGGREGATES, WINDOWS, Step, play, streams


def permitted(over: Window) -> list[Aggregate]:
    """The aggregates that work over a window."""
    return [aggregate for aggregate in AGGREGATES if refusal(aggregate, over) is None]


def same(aggregate: Aggregate, got: Any, want: Any, scale: float) -> bool:
    """Equal in type and to the last bit, but for the aggregates that are approximate by definition."""
    if got is None or want is None:
        return got is want
    if isinstance(aggregate, Quantile):
        return bool(abs(got - want) <= abs(want) * aggregate.accuracy * (1 + 1e-9))
    if isinstance(aggregate, EWMean):
        return math.isclose(got, want, rel_tol=1e-12, abs_tol=scale * 1e-12)
    return type(got) is type(want) and bool(got == want)


def check(declaration: Entity, lateness: int, steps: list[Step]) -> None:
    """Compare every answer with the oracle's."""
    got = play(EntityFeatures(declaration, lateness), steps)
    want = play(NaiveFeatures(declaration), steps)
    meaning = [(aggregate, over) for aggregate in declaration.aggregates for over in declaration.over]
    scale = max(abs(step.values["x"] or 0) for step in steps)
    for step, got_row, want_row in zip(steps, got, want, strict=True):
        if step.verb == "observe":
            continue
        for (aggregate, over), got_value, want_value in zip(meaning, got_row, want_row, strict=True):
            assert same(aggregate, got_value, want_value, scale), (step, aggregate, over, got_value, want_value)


@pytest.mark.parametrize("over", WINDOWS, ids=lambda over: over.label or "lifetime")
@pytest.mark.parametrize("lateness", [0, 9])
@settings(max_examples=40)
@given(drawn=st.data())
def test_every_permitted_pair_equals_the_oracle(over: Window, lateness: int, drawn: st.DataObject) -> None:
    """Every aggregate over every window it works over equals the one computed anew from all events."""
    check(Entity("k", permitted(over), over=over), lateness, drawn.draw(streams(lateness)))
