"""Quantiles within a relative error: DDSketch (Masson, Rim and Lee, PVLDB 12(12), 2019), with removal.

A value falls into the bucket ⌈log(|value|) / log(γ)⌉ with γ = (1 + accuracy) / (1 - accuracy); any value of a bucket
is within `accuracy` of the bucket's middle. A sketch is only counts of buckets, so values can be taken out again and
sketches added and subtracted without loss, which is why we keep one of our own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import ceil, log

from features.missing import MISSING

# Bucket numbers of finite doubles lie within ±2**26 for every accuracy we allow, so positive values can be keyed
# number + _ORIGIN and negative ones -(number + _ORIGIN): the keys sort as the values do, and 0 is zero's.
_ORIGIN = 1 << 28


class Sketch:
    """Counts of values by bucket; grows with the logarithm of the range of the values, not with their number.

    >>> sketch = Sketch(q=0.5, accuracy=0.01)
    >>> for value in range(1, 102):
    ...     sketch.add(value, 0)
    >>> abs(sketch.get() - 51) <= 0.51
    True
    """

    __slots__ = ("_accuracy", "_counts", "_gamma", "_keys", "_log_gamma", "_q", "n")

    def __init__(self, q: float, accuracy: float) -> None:
        self.n = 0
        self._q = q
        self._accuracy = accuracy
        self._gamma = (1 + accuracy) / (1 - accuracy)
        self._log_gamma = log(self._gamma)
        self._counts: dict[int, int] = {}
        self._keys: list[int] = []

    def add(self, value: float, t: int) -> None:
        self._change(self._key(value), 1)

    def remove(self, value: float, t: int) -> None:
        self._change(self._key(value), -1)

    def blank(self) -> Sketch:
        return Sketch(self._q, self._accuracy)

    def takes(self, value: float) -> bool:
        return True

    def merge(self, other: Sketch) -> None:
        for key, count in other._counts.items():
            self._change(key, count)

    def subtract(self, other: Sketch) -> None:
        for key, count in other._counts.items():
            self._change(key, -count)

    def clear(self) -> None:
        self.n = 0
        self._counts.clear()
        self._keys.clear()

    def get(self) -> object:
        """The value at rank ⌊q·(n - 1)⌋ from below, to within the accuracy; MISSING when empty."""
        if self.n == 0:
            return MISSING
        rank = int(self._q * (self.n - 1))
        for key in self._keys:
            rank -= self._counts[key]
            if rank < 0:
                return self._middle(key)
        raise AssertionError("the counts of a sketch do not add up to its size")

    def _key(self, value: float) -> int:
        if value == 0:
            return 0
        number = ceil(log(abs(value)) / self._log_gamma)
        return number + _ORIGIN if value > 0 else -(number + _ORIGIN)

    def _middle(self, key: int) -> float:
        if key == 0:
            return 0.0
        # γ**(number - 1) rather than γ**number: the top bucket's upper edge may lie beyond the largest float.
        middle: float = 2 * self._gamma / (self._gamma + 1) * self._gamma ** (abs(key) - _ORIGIN - 1)
        return middle if key > 0 else -middle

    def _change(self, key: int, by: int) -> None:
        self.n += by
        count = self._counts.get(key, 0) + by
        if count == 0:
            del self._counts[key]
            del self._keys[bisect_left(self._keys, key)]
            return
        if count == by:
            insort(self._keys, key)
        self._counts[key] = count
