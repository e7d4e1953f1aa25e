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

START_MS = 1_522_540_800_000
"""2018-04-01, the first day of the handbook's data."""

DAY_MS = 86_400_000
PER_DAY = 9_600
"""Transactions a day, as in the handbook's data."""


def synthetic(count: int, customers: int, terminals: int, seed: int = 7) -> Iterator[str]:
    """Lines of JSON in order of time: customers, terminals and amounts at random, a fraud in a hundred.

    >>> [json.loads(line)["tx_id"] for line in synthetic(3, 10, 10)]
    [0, 1, 2]
    >>> list(synthetic(100, 10, 10)) == list(synthetic(100, 10, 10))
    True
    """
    rng = random.Random(seed)
    step_ms = DAY_MS // PER_DAY
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


def write_head(path: Path, source: Path | None, count: int | None) -> Path:
    """The first `count` lines (None: all) of a plain or gzipped file as a plain one; synthetic for no source."""
    if source is None:
        return write_synthetic(path, 100_000 if count is None else count, 5_000, 10_000)
    lines = gzip.open(source, "rb") if source.suffix == ".gz" else source.open("rb")
    with lines, path.open("wb") as file:
        file.writelines(islice(lines, count))
    return path
