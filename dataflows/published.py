"""The files of predictions and outcomes, compared line by line with what an audit made again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import msgspec

from dataflows.events import EventId, encode
from dataflows.findings import FINDINGS, Findings
from dataflows.relearn import Said, Taught

if TYPE_CHECKING:
    from dataflows.audit import Auditor

PUBLISHED = 2_000_000
"""Records that are compared with the outputs at the most; their checksums are held in memory."""


class Asked(NamedTuple):
    """What is needed of a question until its outcome comes."""

    time: int
    shown: Any
    examples: int


class _Line(msgspec.Struct):
    """What is looked at of a record first."""

    id: Any


_LEFT = -1
"""In place of a record's checksum: it is known, and was not compared."""


class Published:
    """Compares what was made again with what the outputs hold, line by line."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._files = dict(auditor.published())
        # By kind and id: the checksums of records, with their places in the log's order in the bits above.
        self._lines: dict[str, dict[EventId, list[int]]] = {kind: {} for kind in self._files}
        self._open: dict[int, Asked] = {}
        self._count = 0
        self._logs: list[int] = []
        self._is_full = False

    def begin_log(self) -> None:
        """What comes is of another log."""
        self._logs.append(self._count)
        self._open.clear()

    def said(self, said: Said) -> None:
        """Take a prediction that was made again."""
        self._expect("predictions", said.id, self._auditor.prediction, said)
        if "outcomes" in self._files:
            self._open[said.number] = Asked(
                said.time, self._auditor.shown(said.output, said.frame.begun), said.examples
            )
            if len(self._open) > PUBLISHED:  # many are never answered
                del self._open[next(iter(self._open))]

    def leave(self, said: Said) -> None:
        """Take one that is not to be compared."""
        if "predictions" in self._lines:
            self._lines["predictions"].setdefault(said.id, []).append(_LEFT)

    def taught(self, taught: Taught) -> None:
        """Take an outcome."""
        said = self._open.pop(taught.number, None)
        if said is not None:
            self._expect("outcomes", taught.id, self._auditor.outcome, said, taught)

    def _expect(self, kind: str, id: EventId, record: Callable[..., Any], *of: Any) -> None:
        lines = self._lines.get(kind)
        if lines is None:
            return
        if len(lines) >= PUBLISHED:
            self._is_full = True
            return
        lines.setdefault(id, []).append(self._count << 32 | crc32(encode(record(*of))))
        self._count += 1

    def compare(self, found: Findings, whole: bool) -> None:
        """Read the outputs; `whole`: every prediction was made again."""
        for kind, path in self._files.items():
            self._compare(kind, path, found, whole and kind == "predictions" and not self._is_full)

    def _compare(self, kind: str, path: Path, found: Findings, whole: bool) -> None:
        expected = self._lines[kind]
        matched: list[int] = []
        strange: list[tuple[int, Any]] = []  # lines that nothing was made again of, since the last one that was
        decoder = msgspec.json.Decoder(_Line)
        wrong: set[Any] = set()
        with path.open("rb") as lines:
            for row, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    id = decoder.decode(line).id
                except (msgspec.DecodeError, UnicodeDecodeError):
                    found.note(0, None, f"{path}:{row} is no record")
                    continue
                wanted = expected.get(id) if type(id) in (int, str) else None
                if wanted is None:
                    if matched and len(strange) < FINDINGS:
                        strange.append((row, id))
                    continue
                crc = crc32(line)
                place = next((i for i, each in enumerate(wanted) if each & 0xFFFFFFFF == crc and each >= 0), None)
                if place is not None:
                    matched.append(wanted.pop(place) >> 32)
                    if whole:
                        for other, of in strange:
                            found.note(0, of, f"{path}:{other} is of a prediction that the learn log does not have")
                    strange = []
                elif any(each != _LEFT for each in wanted) or not wanted:
                    wrong.add(id)
                    found.note(0, id, f"{path}:{row} is not what was said, when it is made again")
        found.published[kind] = len(matched) + len(wrong)
        self._find_missing(path, expected, matched, wrong, found)

    def _find_missing(
        self, path: Path, expected: dict[EventId, list[int]], matched: list[int], wrong: set[Any], found: Findings
    ) -> None:
        """Records that are not there, between others of the same log that are."""
        ends: dict[int, tuple[int, int]] = {}
        for place in matched:
            log = bisect_right(self._logs, place)
            low, high = ends.get(log, (place, place))
            ends[log] = (min(low, place), max(high, place))
        for id, left in expected.items():
            for each in left:
                low, high = ends.get(bisect_right(self._logs, each >> 32), (0, 0))
                if each != _LEFT and id not in wrong and low < each >> 32 < high:
                    found.note(0, id, f"{path} does not have it between the others")
