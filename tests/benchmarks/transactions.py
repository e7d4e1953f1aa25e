"""Transactions for the benchmarks: those of the handbook where they are at hand, else synthetic ones of the same form.

Written line by line, so that the process that measures stays small (see `measure`).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

START_MS = 1_522_540_800_000
"""2018-04-01, the first day of the handbook's data."""

SPAN_MS = 21 * 86_400_000
"""What synthetic transactions are spread over, however many they are: labels come 7 days later, so most in time."""

HEAD = 100_000
"""Fewer transactions than these are every n-th of them: 10 days, so that labels are learned along the way."""


def synthetic(count: int, customers: int, terminals: int, seed: int = 7) -> Iterator[str]:
    """Lines of JSON in order of time: customers, terminals and amounts at random, a fraud in a hundred.

    >>> [json.loads(line)["tx_id"] for line in synthetic(3, 10, 10)]
    [0, 1, 2]
    >>> list(synthetic(100, 10, 10)) == list(synthetic(100, 10, 10))
    True
    """
    rng = random.Random(seed)
    step_ms = SPAN_MS // count
    for number in range(count):
        amount = round(rng.expovariate(1 / 50), 2)
        # More often at large amounts, so that there is something to learn.
        fraud = int(rng.random() < (0.2 if amount > 200 else 0.005))
        row = {
            "tx_id": number,
            "ts": START_MS + number * step_ms + rng.randrange(step_ms),
            "customer": rng.randrange(customers),
            "terminal": rng.randrange(terminals),
            "amount": amount,
            "fraud": fraud,
        }
        yield json.dumps(row, separators=(",", ":"))


def write_synthetic(path: Path, count: int, customers: int, terminals: int) -> Path:
    """Synthetic transactions as a plain file; the path."""
    with path.open("w") as file:
        file.writelines(f"{line}\n" for line in synthetic(count, customers, terminals))
    return path


def write_sample(path: Path, source: Path | None, count: int | None) -> Path:
    """`count` transactions (None: all) of a plain or gzipped file as a plain one; synthetic for no source.

    The first ones, or for fewer than `HEAD` every n-th of the first `HEAD`.
    """
    if source is None:
        return write_synthetic(path, HEAD if count is None else count, 5_000, 10_000)
    every = 1 if count is None else max(1, HEAD // count)
    with _open(source) as lines, path.open("wb") as file:
        file.writelines(islice(lines, 0, None if count is None else count * every, every))
    return path


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
