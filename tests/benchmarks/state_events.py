"""Events for the state benchmark: one wide one for each entity, then narrow ones of entities at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

START_US = 1_522_540_800_000_000
WINDOW_US = 7 * 86_400_000_000
PER_WINDOW = 20
"""Events of an entity in 7 days, once it has had so many."""

WAITING = 500
"""Questions that wait for their label at any time."""

PROFILE_CHARS = 900
_CHUNK = 10_000


class Line(msgspec.Struct, omit_defaults=True, gc=False):
    """One event as it is written; see `state_job.Ping`."""

    number: int
    at: int
    entity: int
    amount: float
    wait: int
    y: bool
    profile: str | None = None


def events(entities: int, seed: int = 7) -> Iterator[Line]:
    """Events without end, in order of time: the first `entities` of them are wide, one for each entity.

    >>> some = list(islice(events(3), 5))
    >>> [len(line.profile or "") for line in some], sorted(line.entity for line in some[:3])
    ([900, 900, 900, 0, 0], [0, 1, 2])
    >>> list(islice(events(3), 5)) == some
    True
    """
    rng = random.Random(seed)
    first = list(range(entities))
    rng.shuffle(first)
    step_us = WINDOW_US // (PER_WINDOW * entities)
    filling = "." * (PROFILE_CHARS - 8)
    number = 0
    while True:
        entity = first[number] if number < entities else int(rng.random() * entities)
        amount = round(rng.expovariate(1 / 50), 2)
        profile = f"{entity:08d}{filling}" if number < entities else None
        y = rng.random() < (0.2 if amount > 200 else 0.005)  # so that there is something to learn
        yield Line(number, START_US + number * step_us, entity, amount, WAITING * step_us, y, profile)
        number += 1


def write(directory: Path, entities: int, count: int) -> tuple[Path, Path]:
    """Two files of one name: the wide events alone, and the same followed by `count` narrow ones.

    The second begins like the first, so a run that has read the first goes on in the second.
    """
    encode = msgspec.json.Encoder().encode_lines
    lines = events(entities)
    wide, full = (directory / name / "events.jsonl" for name in ("wide", "full"))
    for path in (wide, full):
        path.parent.mkdir()
    with wide.open("wb") as alone, full.open("wb") as both:
        for file_count, files in ((entities, (alone, both)), (count, (both,))):
            for done in range(0, file_count, _CHUNK):
                chunk = encode(list(islice(lines, min(_CHUNK, file_count - done))))
                for file in files:
                    file.write(chunk)
    return wide, full
