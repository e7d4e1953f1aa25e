"""State as rows: what its holders give to be kept, and take back when they need it again.

A holder of state (the features of a key group, a learner, the reader) keeps what it works with in plain Python objects.
What of it changed since it was asked last it gives as rows, so that a checkpoint costs what has happened since the one
before and not what there is. Where rows are kept is not its business: in memory here, in SQLite by
`dataflows.state`.

A row has a key (text) and parts: `PUT` replaces what was there, `APPEND` adds to it, `GONE` ends it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

PUT = 0
APPEND = 1
GONE = 2

Change = tuple[str, int, bytes]
"""Key of a row, what to do with it, and the pickled part (empty for `GONE`)."""


class Rows(Protocol):
    """Where a holder finds its rows again; parts are unpickled and in the order they were given."""

    def get(self, key: str) -> list[Any]:
        """The parts of a row; empty when there is none."""
        ...

    def scan(self, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        """The rows whose keys begin with `prefix`, in the order of their keys."""
        ...

    def empty(self) -> bool:
        """Whether there are no rows at all, so that looking for one is in vain."""
        ...


class MemoryRows:
    """Rows kept in memory, as the other side of `changes`.

    >>> rows = MemoryRows()
    >>> rows.apply([("a", PUT, pickle.dumps(1)), ("a", APPEND, pickle.dumps(2)), ("b", PUT, pickle.dumps(3))])
    >>> rows.apply([("b", GONE, b"")])
    >>> rows.get("a"), rows.get("b"), rows.empty()
    ([1, 2], [], False)
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[bytes]] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        """Keep what a holder gives."""
        for key, kind, part in changes:
            if kind == APPEND:
                self._parts[key].append(part)
            elif kind == PUT:
                self._parts[key] = [part]
            else:
                self._parts.pop(key, None)

    def get(self, key: str) -> list[Any]:
        return [pickle.loads(part) for part in self._parts.get(key, ())]

    def scan(self, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        for key in sorted(self._parts):
            if key.startswith(prefix):
                yield key, self.get(key)

    def empty(self) -> bool:
        return not self._parts


def put(key: str, value: Any) -> Change:
    """The change that keeps one object as a row."""
    return key, PUT, pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def key_text(key: Any) -> str:
    """The row key of an entity: text, an int, None, or a tuple of these. Different keys never share a text.

    >>> key_text("c-1"), key_text(7), key_text("7"), key_text(("a", 1)), key_text(None)
    ('"c-1', '7', '"7', '["a", 1]', 'null')
    """
    kind = type(key)
    if kind is str:  # one quote before it tells it from the others, which are JSON
        try:
            key.encode()
        except UnicodeEncodeError:  # a lone surrogate, which no database takes as text
            return "\\" + json.dumps(key)
        return '"' + key  # type: ignore[no-any-return]
    if kind is int:
        return str(key)
    return json.dumps(key)


def key_of(text: str) -> Any:
    """What `key_text` made the text of.

    >>> [key_of(key_text(key)) for key in ("c-1", 7, "7", ("a", 1), None, chr(0xd800))]
    ['c-1', 7, '7', ('a', 1), None, '\\ud800']
    """
    if text.startswith('"'):
        return text[1:]
    if text.startswith("\\"):
        return json.loads(text[1:])
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value
