"""Parts of the product that a crash test can switch off or tighten, by environment variables read nowhere else.

`CHAOS_WITHOUT` (words, with a comma between): `roll_back`, `stale_snapshots` do nothing, so that a test can show that
without them a difference appears. `CHAOS_FLUSH`: after how many changes steps write before a checkpoint.

The module of the jobs calls `apply`, so that the launcher and every worker have them, and nobody else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def apply() -> None:
    """Patch this process."""
    without = os.environ.get("CHAOS_WITHOUT", "").split(",")
    flush = os.environ.get("CHAOS_FLUSH")
    if flush:
        from dataflows import flow

        flow.FLUSH = flow.FLUSH_LIVE = flow.FLUSH_QUESTIONS = flow.FLUSH_QUESTIONS_LIVE = int(flush)
    if "roll_back" in without:
        from dataflows.state import StateFile

        StateFile.roll_back = _leave_rows  # type: ignore[method-assign]
    if "stale_snapshots" in without:
        from dataflows import startup

        startup.remove_stale_snapshots = _leave_snapshots  # type: ignore[attr-defined]


def _leave_rows(self: Any, to: Any) -> int:
    return 0


def _leave_snapshots(recovery: Path) -> int:
    return 0
