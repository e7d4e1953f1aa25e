"""Events from any iterable: notebooks and tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from dataflows.events import Event, Raw, Undecodable
from dataflows.order import Partition, Source


class Memory(Source):
    """Events, dicts or JSON bytes from an iterable that is read once, from its beginning.

    >>> class Reading(Event, time="at", unit="s"):
    ...     at: int
    >>> part = Memory(event=Reading, items=[{"at": 1}, Reading(at=2)]).open("memory", None, False)
    >>> [part.decode(raw).event_time() for _, raw in part.pull(10)]
    [1000000, 2000000]
    """

    items: Any
    name: str = "memory"

    def names(self) -> list[str]:
        return [self.name]

    def open(self, name: str, position: Any | None, follow: bool) -> Partition:
        return _MemoryPartition(name, self.event, self.items)


class _MemoryPartition(Partition):
    def __init__(self, name: str, event: type[Event], items: Iterable[Raw]) -> None:
        self.name = name
        self._event = event
        self._items: Iterator[Raw] = iter(items)
        self._offset = 0

    def pull(self, limit: int) -> list[tuple[int, Raw]]:
        records = list(enumerate(islice(self._items, limit), self._offset + 1))
        self._offset += len(records)
        self.done = len(records) < limit
        return records

    def position(self, back: int = 0) -> int:
        return self._offset - back

    def decode(self, raw: Raw) -> Event:
        if isinstance(raw, self._event):
            return raw
        if isinstance(raw, bytes):
            return self._event.decode(raw)
        if isinstance(raw, dict):
            return self._event.from_row(raw)
        raise Undecodable("invalid", f"{type(raw).__name__} is no {self._event.__name__}, dict or bytes")
