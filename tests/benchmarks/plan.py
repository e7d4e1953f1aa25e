"""How much to measure, and what a benchmark gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks.transactions import write_sample

ENTITIES = (1_000, 100_000, 1_000_000)
PARTS = ("throughput", "memory", "kill", "retained", "latency", "overload")
"""What `state` measures, and for how many entities; `kafka` measures the throughput and the last two."""


@dataclass(frozen=True)
class Plan:
    """How much to measure: `source` is a file of transactions (None: synthetic ones).

    `entities`, `seconds`, `checkpoints` and `parts` (none: all) are for `state` alone.
    """

    source: Path | None
    scratch: Path
    events: int
    pairs: int
    rounds: int
    quick: bool
    entities: tuple[int, ...] = ()
    seconds: float = 0.0
    checkpoints: int = 0
    parts: tuple[str, ...] = ()

    def sample(self, count: int | None) -> Path:
        """`count` transactions (None: all) as a plain file, written once."""
        path = self.scratch / f"transactions-{count}.jsonl"
        return path if path.exists() else write_sample(path, self.source, count)


Result = tuple[dict[str, Any], list[Table]]
"""What goes into the JSON file, and what people see."""
