"""How long things took, counted in fixed buckets: what a histogram of Prometheus is made from."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

BOUNDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5,
    1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0, 43200.0, 86400.0,
)  # fmt: skip
"""Upper bounds of the buckets in seconds, from a millisecond to a day; what took longer has a bucket of its own."""


class Tally:
    """Counts durations by bucket.

    >>> tally = Tally()
    >>> tally.observe(0.001)
    >>> tally.observe(0.3, count=2)
    >>> tally.observe(100_000.0)
    >>> state = tally.state()
    >>> dict((bound, n) for bound, n in zip([*state["buckets"], "more"], state["counts"]) if n)
    {0.001: 1, 0.5: 2, 'more': 1}
    """

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count a duration, so many times. Less than none counts as none: clocks of two machines differ."""
        if seconds < 0.0:
            seconds = 0.0
        self._counts[bisect_left(BOUNDS, seconds)] += count
        self._sum += seconds * count

    def state(self) -> dict[str, Any]:
        """The bounds, the counts of each bucket alone (the last: above all bounds), and the sum of all durations."""
        return {"buckets": list(BOUNDS), "counts": list(self._counts), "sum": self._sum}
