"""Sums, means and variances in exact arithmetic on ints, rounded once at the end.

A finite float is a whole number of units of 2**-shift for some shift. Added up in such units, sums do not depend on
the order of arrival and do not drift when values are taken out again. Python's int / int rounds correctly, so what
comes out is the float nearest to the true result.
"""

from __future__ import annotations

from math import isqrt

SHIFT_STEP = 64
"""Shifts grow in steps of this many bits: 64 hold every double of magnitude 2**-12 and up."""


def units(value: float, shift: int) -> int:
    """`value` · 2**`shift`, exactly. The shift must be `shift_for(value)` or more.

    >>> units(0.75, 2), units(-3, 1)
    (3, -6)
    """
    numerator, denominator = value.as_integer_ratio()
    return numerator << (shift + 1 - denominator.bit_length())


def shift_for(value: float) -> int:
    """The smallest of our shifts at which `value` is a whole number of units: 0, 64, 128 …

    >>> shift_for(57), shift_for(57.16), shift_for(1e-9)
    (0, 64, 128)
    """
    bits = value.as_integer_ratio()[1].bit_length() - 1
    return -(-bits // SHIFT_STEP) * SHIFT_STEP


def ratio(numerator: int, denominator: int) -> float:
    """The float nearest to `numerator` / `denominator`; ±inf beyond the largest float. The denominator is positive.

    >>> ratio(1, 3), ratio(-(10**400), 1)
    (0.3333333333333333, -inf)
    """
    try:
        return numerator / denominator
    except OverflowError:
        return float("inf") if numerator > 0 else float("-inf")


def root(numerator: int, denominator: int) -> float:
    """The float nearest to the square root of `numerator` / `denominator`.

    >>> root(2, 1), root(1, 4), root(0, 7), root(10**400, 1) == 1e200
    (1.4142135623730951, 0.5, 0.0, True)
    """
    if numerator == 0:
        return 0.0
    # 55 or more bits of the root and one "sticky" bit for the rest (rounding to odd) make one later rounding exact.
    half = (numerator.bit_length() - denominator.bit_length() - 112) // 2
    if half >= 0:
        denominator <<= 2 * half
    else:
        numerator <<= -2 * half
    whole = isqrt(numerator // denominator)
    sticky = whole | (whole * whole * denominator != numerator)
    return ratio(sticky << half, 1) if half >= 0 else ratio(sticky, 1 << -half)


def spread(count: int, total: int, squares: int, ddof: int, shift: int) -> tuple[int, int]:
    """The variance as a fraction (numerator, denominator): (n·Σx² - (Σx)²) / (n·(n - ddof)); `count` > `ddof`."""
    return count * squares - total * total, count * (count - ddof) << 2 * shift
