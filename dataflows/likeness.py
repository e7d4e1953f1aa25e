"""Whether two models are the same, bit for bit, and if not, where they differ.

Pickles of equal objects need not be equal: they tell apart what is shared from what is merely equal. So what the
pickles would hold is compared instead, piece by piece.
"""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np

_NONE = object()

Pairs = Iterable[tuple[Any, Any]]

Seen = dict[tuple[int, int], tuple[Any, Any]]
"""What was compared, by identity; held, because others would get the identity of what is gone."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal bit for bit: of the same type, NaN equal to NaN, 0.0 not to -0.0.

    >>> same(float("nan"), float("nan")), same(0.0, -0.0), same(1, 1.0), same({True: 0.5}, {True: 0.5})
    (True, False, False, True)
    """
    return first_difference(one, other) is None


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two objects differ first, and in what; None where they are the same.

    >>> from river import linear_model
    >>> a, b = linear_model.LinearRegression(), linear_model.LinearRegression()
    >>> first_difference(a, b)
    >>> b.intercept = 0.5
    >>> first_difference(a, b, "model")
    'model.intercept: 0.0 and 0.5'
    """
    try:
        return next(_differences(one, other, where, {}), None)
    except RecursionError:  # deeper than Python goes
        return _deep_difference(one, other, where)


def _deep_difference(one: Any, other: Any, where: str) -> str | None:
    try:
        return None if pickle.dumps(one, 5) == pickle.dumps(other, 5) else f"{where}: somewhere deep inside"
    except RecursionError:
        return f"{where}: too deep to be compared"


def _differences(one: Any, other: Any, where: str, seen: Seen) -> Iterator[str]:
    kind = type(one)
    if kind is not type(other):
        yield f"{where}: {_short(one)} and {_short(other)}"
    elif kind is float:
        if struct.pack("<d", one) != struct.pack("<d", other):
            yield f"{where}: {one!r} and {other!r}"
    elif kind in (int, str, bytes, bool, type(None), complex):
        if one != other:
            yield f"{where}: {_short(one)} and {_short(other)}"
    elif one is not other and (id(one), id(other)) not in seen:
        seen[id(one), id(other)] = one, other
        yield from _parts(one, other, where, seen)


def _parts(one: Any, other: Any, where: str, seen: Seen) -> Iterator[str]:
    if isinstance(one, np.ndarray) and one.dtype != object:
        if (one.dtype, one.shape) != (other.dtype, other.shape) or one.tobytes() != other.tobytes():
            yield f"{where}: {_short(one)} and {_short(other)}"
    elif type(one) in (list, tuple):
        yield from _items(one, other, where, seen)
    elif type(one) is dict:
        yield from _pairs(one.items(), other.items(), where, seen)
    elif type(one) in (set, frozenset):
        if one != other:
            yield f"{where}: {_short(one)} and {_short(other)}"
    elif isinstance(one, type) or callable(getattr(one, "__get__", None)):
        if one != other and pickle.dumps(one, 5) != pickle.dumps(other, 5):
            yield f"{where}: {_short(one)} and {_short(other)}"
    else:
        yield from _reduced(one, other, where, seen)


def _reduced(one: Any, other: Any, where: str, seen: Seen) -> Iterator[str]:
    """What a pickle would hold: how it is made, its state, its items."""
    ours, theirs = one.__reduce_ex__(4), other.__reduce_ex__(4)
    if isinstance(ours, str) or isinstance(theirs, str):
        yield from _differences(ours, theirs, where, seen)
        return
    parts, others = _padded(ours), _padded(theirs)
    yield from _items(parts[:2], others[:2], where, seen)
    yield from _state(parts[2], others[2], where, seen)
    yield from _items(list(parts[3] or ()), list(others[3] or ()), where, seen)
    yield from _pairs(parts[4] or (), others[4] or (), where, seen)


def _padded(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*reduced, None, None, None)[:5]


def _state(one: Any, other: Any, where: str, seen: Seen) -> Iterator[str]:
    if type(one) is dict and type(other) is dict and all(type(name) is str for name in (*one, *other)):
        for name in dict.fromkeys((*one, *other)):
            if _is_unseeded(one, name) and _is_unseeded(other, name):
                continue
            yield from _differences(one.get(name, _NONE), other.get(name, _NONE), f"{where}.{name}", seen)
    else:
        yield from _differences(one, other, where, seen)


def _is_unseeded(state: dict[str, Any], name: str) -> bool:
    """Whether this is a generator without a seed: another one in every process, so that no result may depend on it.

    river's distributions hold one each, in the leaves of trees, and draw from it only when asked for a sample.
    """
    return isinstance(state.get(name), random.Random) and state.get("seed", 0) is None


def _items(one: Iterable[Any], other: Iterable[Any], where: str, seen: Seen) -> Iterator[str]:
    for place, (a, b) in enumerate(zip_longest(one, other, fillvalue=_NONE)):
        yield from _differences(a, b, f"{where}[{place}]", seen)


def _pairs(one: Pairs, other: Pairs, where: str, seen: Seen) -> Iterator[str]:
    """Items of dictionaries, in their order: sums over them depend on it."""
    for ours, theirs in zip_longest(one, other):
        if ours is None or theirs is None:
            yield f"{where}: {_short(ours)} and {_short(theirs)}"
        else:
            yield from _differences(ours[0], theirs[0], f"{where} key", seen)
            yield from _differences(ours[1], theirs[1], f"{where}[{_short(ours[0])}]", seen)


def _short(value: Any) -> str:
    try:
        text = "nothing" if value is _NONE else repr(value)
    except Exception:  # noqa: BLE001 - of river's classes some cannot be shown
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:59]}…"
