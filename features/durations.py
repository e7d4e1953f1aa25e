"""Durations as people write them ("7d", "500ms") and as we compute with them: whole microseconds."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS_US = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
_TEXT = re.compile(r"(\d+)\s*(us|ms|s|m|h|d|w)")
_MICROSECOND = timedelta(microseconds=1)


def duration(value: str | int | timedelta) -> int:
    """A duration in microseconds.

    Takes text (a whole number and one of us, ms, s, m, h, d, w), a `timedelta`, or microseconds as an int.
    Raises ValueError for text of another form and for negative durations, TypeError for other types.

    >>> duration("7d"), duration("500ms"), duration(timedelta(minutes=5)), duration(250)
    (604800000000, 500000, 300000000, 250)
    >>> duration("1.5h")
    Traceback (most recent call last):
    ...
    ValueError: not a duration: '1.5h'. Write a whole number and a unit: us, ms, s, m, h, d or w, such as "7d"
    """
    if isinstance(value, str):
        return _parse(value)
    if isinstance(value, timedelta):
        microseconds = value // _MICROSECOND
    elif type(value) is int:  # not bool
        microseconds = value
    else:
        raise TypeError(
            f"not a duration: {value!r} of type {type(value).__name__}. "
            'Write it as text ("7d"), as a timedelta, or as an int of microseconds'
        )
    if microseconds < 0:
        raise ValueError(f"a duration cannot be negative: {value!r}")
    return microseconds


def duration_text(us: int) -> str:
    """The shortest text for a duration: its largest unit, up to days, that leaves a whole number.

    >>> duration_text(duration("7d")), duration_text(duration("90s")), duration_text(duration("24h"))
    ('7d', '90s', '1d')
    """
    for unit in ("d", "h", "m", "s", "ms"):
        count, rest = divmod(us, _UNITS_US[unit])
        if rest == 0 and count != 0:
            return f"{count}{unit}"
    return f"{us}us" if us else "0s"


def _parse(text: str) -> int:
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f'not a duration: {text!r}. Write a whole number and a unit: us, ms, s, m, h, d or w, such as "7d"'
        )
    return int(match[1]) * _UNITS_US[match[2]]
