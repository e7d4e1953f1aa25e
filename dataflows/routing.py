"""What travels between the steps of a batch, and to which worker.

Key groups are the engine's keys. Their strings are chosen so that the engine's hash spreads groups evenly over workers
and puts the same group of every step on the same worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import msgspec

from dataflows.admit import GLOBAL_GROUP, Work

# -- keys


def siphash13(text: str) -> int:
    """The hash by which the engine routes keys: SipHash-1-3 with zero keys over the text and a 0xff byte.

    Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), with 1 and 3 rounds as in Rust's standard
    library. If the engine ever routes otherwise, groups are spread less evenly; results stay the same.
    """
    mask = (1 << 64) - 1
    content = text.encode() + b"\xff"
    v0, v1, v2, v3 = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573

    def rotate(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (64 - bits))) & mask

    def round_() -> None:
        nonlocal v0, v1, v2, v3
        v0 = (v0 + v1) & mask
        v2 = (v2 + v3) & mask
        v1, v3 = rotate(v1, 13) ^ v0, rotate(v3, 16) ^ v2
        v0 = rotate(v0, 32)
        v2 = (v2 + v1) & mask
        v0 = (v0 + v3) & mask
        v1, v3 = rotate(v1, 17) ^ v2, rotate(v3, 21) ^ v0
        v2 = rotate(v2, 32)

    whole = len(content) // 8 * 8
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, whole, 8)]
    words.append((len(content) & 0xFF) << 56 | int.from_bytes(content[whole:], "little"))
    for word in words:
        v3 ^= word
        round_()
        v0 ^= word
    v2 ^= 0xFF
    for _ in range(3):
        round_()
    return v0 ^ v1 ^ v2 ^ v3


_EVEN = 120
"""Key groups spread evenly over 1 to 6, 8, 10 or 12 workers: the divisors of this number."""


@lru_cache(maxsize=1024)
def group_key(group: int) -> str:
    """The engine's key of a key group: the worker is the group modulo the number of workers.

    >>> siphash13(group_key(7)) % 120
    7
    """
    attempt = 0
    while siphash13(f"{group:03d}.{attempt}") % _EVEN != group % _EVEN:
        attempt += 1
    return f"{group:03d}.{attempt}"


# -- what travels


class Bundle(msgspec.Struct, array_like=True, gc=False):
    """A batch's rows for one key group of a feature step, and by place in the batch the learner group that asks.

    `owners` is None where one learner, `home`, has all questions.
    """

    number: int
    group: int
    rows: list[Any]
    home: int
    owners: list[int] | None
    clock: int | None


class Head(msgspec.Struct, array_like=True, gc=False):
    """A batch's operations for one learner group, and from how many feature bundles columns will come."""

    number: int
    group: int
    questions: int
    operations: list[Any]
    parts: int


class Part(msgspec.Struct, array_like=True, gc=False):
    """Feature values for one learner group from one bundle."""

    number: int
    entity: int
    places: list[int]
    answers: list[Any]


class PublisherHead(msgspec.Struct, array_like=True, gc=False):
    """A batch's rejects, and how many learners will report."""

    number: int
    rejects: list[Any]
    learners: int
    end: bool
    status: dict[str, Any]


class Tick(msgspec.Struct, array_like=True, gc=False):
    """A checkpoint is complete: outputs that publish by it may do so now. Sent only where there are such.

    Without it they would wait for the next batch, which an idle input gives late or never.
    """


class SaidPart(msgspec.Struct, array_like=True, gc=False):
    """What one learner said of a batch."""

    number: int
    said: list[Any]


def learner_heads(works: list[Work | Tick]) -> Iterable[tuple[str, Head]]:
    """To each learner what it has to do for the batches."""
    for work in works:
        if type(work) is not Work:
            continue
        for group, operations in work.learners.items():
            parts = len(work.reads.get(group, ()))
            yield group_key(group), Head(work.number, group, work.questions, operations, parts)


def bundles_of(index: int) -> Callable[[list[Work | Tick]], Iterable[tuple[str, Bundle]]]:
    """What gives the step of an Entity declaration the batches' rows."""

    def bundles(works: list[Work | Tick]) -> Iterable[tuple[str, Bundle]]:
        for work in works:
            if type(work) is not Work:
                continue
            owners = work.owners if len(work.reads) > 1 else None
            home = next(iter(work.reads), 0)
            for (entity, group), rows in work.features.items():
                if entity == index:
                    yield group_key(group), Bundle(work.number, group, rows, home, owners, work.clock)

    return bundles


def publisher_heads(works: list[Work | Tick]) -> Iterable[tuple[str, PublisherHead | Tick]]:
    """To the publisher what it has to know of the batches."""
    for work in works:
        if type(work) is not Work:
            yield PUBLISH, Tick()
            continue
        yield PUBLISH, PublisherHead(work.number, work.rejects, len(work.learners), work.end, work.status)


PUBLISH = group_key(GLOBAL_GROUP)
"""Publish sits on the worker of the global model, so that what it said need not travel."""
