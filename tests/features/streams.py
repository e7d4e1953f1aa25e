"""Random streams of questions, events and reads for the tests of EntityFeatures."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st
from river import stats

from features import (
    Aggregate,
    Count,
    EWMean,
    First,
    Hopping,
    Last,
    Lifetime,
    Max,
    Mean,
    Min,
    MostFrequent,
    NUnique,
    Quantile,
    Rate,
    River,
    Session,
    Sliding,
    Std,
    Sum,
    Tiled,
    TimeSince,
    Tumbling,
    Var,
    Window,
)

AGGREGATES: tuple[Aggregate, ...] = (
    Count(),
    Sum("x"),
    Mean("x"),
    Var("x"),
    Std("x", ddof=0),
    Min("x"),
    Max("x"),
    First("tag"),
    Last("tag"),
    NUnique("tag", limit=3),
    MostFrequent("tag"),
    Quantile("x", q=0.6),
    TimeSince(),
    Rate(per=10),
    EWMean("x", halflife=20),
    River(stats.PeakToPeak(), "x"),
)
WINDOWS: tuple[Window, ...] = (
    Sliding(10),
    Sliding(25),
    Last(1),
    Last(4),
    Tumbling(12),
    Hopping(12, hop=4),
    Hopping(10, hop=4),
    Session(gap=6),
    Tiled(20, resolution=5),
    Tiled(13, resolution=4),
    Lifetime(),
)
NUMBERS = (None, 0, False, True, 1, -3, 0.0, -0.0, 0.1, 57.16, -57.16, 1e-9, 1e16, 5e-324, 3e300, 10**20)
TAGS = (None, 0, False, "", 1, 1.0, True, "a", "b", (1, "a"))


class Step(NamedTuple):
    """One call: of "ask", "observe" or "read"."""

    verb: str
    key: Any
    t: int
    values: dict[str, Any]


@st.composite
def streams(draw: st.DrawFn, lateness: int = 0, keys: int = 2, most: int = 40) -> list[Step]:
    """Steps in time order, at most `lateness` behind the newest time so far."""
    newest = draw(st.integers(-30, 30))
    steps = []
    for _ in range(draw(st.integers(1, most))):
        newest += draw(st.sampled_from((0, 0, 0, 1, 1, 2, 3, 5, 8, 30)))
        t = newest - draw(st.integers(0, lateness))
        verb = draw(st.sampled_from(("ask", "ask", "observe", "read")))
        key = draw(st.integers(0, keys - 1))
        values = {"x": draw(st.sampled_from(NUMBERS)), "tag": draw(st.sampled_from(TAGS))}
        steps.append(Step(verb, key, t, values))
    return steps


def play(features: Any, steps: list[Step]) -> list[Any]:
    """What each step answers: None for "observe"."""
    answers = []
    for verb, key, t, values in steps:
        row = tuple(values[column] for column in features.columns)
        if verb == "ask":
            answers.append(features.ask(key, t, row))
        elif verb == "observe":
            answers.append(features.observe(key, t, row))
        else:
            answers.append(features.read(key, t))
    return answers
