"""Whether two objects are the same to the last bit, seen as pickle sees them: attributes, slots, `__getstate__`.

Two pickles of equal models may differ in bytes (what is shared, how strings are remembered), so objects are compared.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
from river.proba.base import Distribution

_ATOMS = (int, str, bytes, type, type(None), type(...), type(NotImplemented), FunctionType, ModuleType)


def difference(one: Any, other: Any, ordered: bool = True) -> str | None:
    """Where two objects differ first, in words; None where they do not.

    Floats are compared by their bits. `ordered`: the items of dicts must come in the same order, as sums over them may
    depend on it.

    >>> difference({"a": [1, 2.0]}, {"a": [1, 2.0]})
    >>> difference({"a": [1, 0.0]}, {"a": [1, -0.0]})
    "['a'][1]: 0.0 is not -0.0"
    >>> difference({1: 2, 3: 4}, {3: 4, 1: 2}), difference({1: 2, 3: 4}, {3: 4, 1: 2}, ordered=False)
    ('.keys()[0]: 1 is not 3', None)
    >>> difference(1, True), difference({1, 2}, {2, 1}), difference(float("nan"), float("nan"))
    (': int is not bool', None, None)
    """
    return _Comparison(ordered).of(one, other, "")


class _Comparison:
    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._seen: set[tuple[int, int]] = set()
        self._alive: list[Any] = []  # what only lives here must not give its id to another

    def of(self, one: Any, other: Any, path: str) -> str | None:
        if one is other:
            return None
        if type(one) is not type(other):
            return f"{path}: {type(one).__name__} is not {type(other).__name__}"
        if isinstance(one, float):
            same = struct.pack("<d", one) == struct.pack("<d", other)
            return None if same else f"{path}: {one!r} is not {other!r}"
        if type(one) in _ATOMS or (
            isinstance(one, BuiltinFunctionType) and isinstance(one.__self__, ModuleType | None)
        ):
            return None if one == other else f"{path}: {_short(one)} is not {_short(other)}"
        if (id(one), id(other)) in self._seen:
            return None
        self._seen.add((id(one), id(other)))
        self._alive += [one, other]
        return self._parts(one, other, path)

    def _parts(self, one: Any, other: Any, path: str) -> str | None:
        if isinstance(one, np.ndarray | np.generic):
            return self._arrays(np.asarray(one), np.asarray(other), path)
        if isinstance(one, itertools.count):
            return None if repr(one) == repr(other) else f"{path}: {one!r} is not {other!r}"
        if isinstance(one, set | frozenset):
            return self._sets(one, other, path)
        if type(one) is dict:
            return self._dicts(one, other, path)
        if type(one) in (list, tuple):
            return self._lists(one, other, path)
        return self._reduced(one, other, path)

    def _arrays(self, one: Any, other: Any, path: str) -> str | None:
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{path}: {one.dtype}{one.shape} is not {other.dtype}{other.shape}"
        if one.dtype == object:
            return self._lists(one.ravel().tolist(), other.ravel().tolist(), path)
        return None if one.tobytes() == other.tobytes() else f"{path}: {_short(one)} is not {_short(other)}"

    def _sets(self, one: Any, other: Any, path: str) -> str | None:
        # A set's order says nothing; equal elements of different types (1, 1.0) are told apart by their texts.
        return self._lists(sorted(one, key=_sort_text), sorted(other, key=_sort_text), path)

    def _dicts(self, one: Any, other: Any, path: str) -> str | None:
        keys, others = list(one), list(other)
        if not self._ordered:
            keys.sort(key=_sort_text)
            others.sort(key=_sort_text)
        found = self._lists(keys, others, f"{path}.keys()")
        if found is not None:
            return found
        pairs = zip(keys, others, strict=True)
        return _first(self.of(one[a], other[b], f"{path}[{_short(a)}]") for a, b in pairs)

    def _lists(self, one: Any, other: Any, path: str) -> str | None:
        found = _first(self.of(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=False)))
        if found is None and len(one) != len(other):
            return f"{path}: {len(one)} elements, not {len(other)}"
        return found

    def _reduced(self, one: Any, other: Any, path: str) -> str | None:
        ours, theirs = ([_listed(part) for part in _padded(each.__reduce_ex__(4))] for each in (one, other))
        if isinstance(one, Distribution) and one.seed is None:
            # Unseeded, so never the same; nobody draws from it: river's trees only ask for densities.
            ours[2], theirs[2] = (state | {"_rng": None} for state in (ours[2], theirs[2]))
        what = (".new", ".args", "", "", "")
        return _first(self.of(a, b, path + name) for a, b, name in zip(ours, theirs, what, strict=False))


def _padded(reduced: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` gives: builder, arguments, state, items of a list, items of a dict (as a dict)."""
    if isinstance(reduced, str):
        return (reduced,)
    parts = (*reduced, None, None, None)[:5]
    return (*parts[:4], None if parts[4] is None else dict(parts[4]))


def _listed(part: Any) -> Any:
    return list(part) if hasattr(part, "__next__") else part


def _first(found: Iterable[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def _sort_text(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
