"""How a run gets on, as a line for people."""

from __future__ import annotations

import time as wall
from typing import Any

from rich.console import Console
from rich.live import Live

from dataflows.events import to_datetime


class Progress:
    """Shows how a run gets on: a live line on a terminal, else a plain line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._next = wall.monotonic() + 2.0
        self._before: tuple[float, int] | None = None
        self._rate = 0.0

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: dict[str, Any]) -> None:
        """Take the newest status of a run."""
        if not status:
            return
        now = wall.monotonic()
        if self._live is None and now < self._next:
            return
        self._measure(now, status.get("questions", 0))
        line = status_line(status, self._rate)
        if self._live is not None:
            self._live.update(line)
        else:
            self._console.print(line, soft_wrap=True, highlight=False)
            self._next = now + 5.0

    def _measure(self, now: float, questions: int) -> None:
        if self._before is None:
            self._before = (now, questions)
        elif now - self._before[0] >= 1.0:
            self._rate = (questions - self._before[1]) / (now - self._before[0])
            self._before = (now, questions)


def status_line(status: dict[str, Any], rate: float) -> str:
    """One line: events, events/s, watermark, open questions, rejects, metrics."""
    parts = [f"{status.get('questions', 0):,} events"]
    if rate:
        parts.append(f"{rate:,.0f}/s")
    if status.get("watermark") is not None:
        parts.append(f"watermark {to_datetime(status['watermark']):%Y-%m-%d %H:%M}")
    parts.append(f"{status.get('open', 0):,} open")
    parts.append(f"{status.get('counts', {}).get('rejects', 0):,} rejects")
    if not status.get("outcomes"):
        return " · ".join(parts)
    parts += [f"{name} {value:.4f}" for name, value in status.get("metrics", {}).items() if value is not None]
    return " · ".join(parts)
