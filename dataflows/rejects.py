"""The rejects of a job: read back from where they went, and sent again to the inputs they came from.

A record that was sent again is not sent a second time: its place and a checksum go to a file in the state directory
once the send was acknowledged. A process that is killed between the two sends again; the job knows the event by its id.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import msgspec

from dataflows.connectors import Kafka
from dataflows.connectors.files import LineFile
from dataflows.events import Reject
from dataflows.job import Job, JobError, Sink
from dataflows.order import Source
from dataflows.settings import RunDirectory, output_sinks

Input = Literal["events", "labels"]

BATCH = 1_000
"""Records sent at once; what was acknowledged is remembered after each."""

_OF_TOPIC = re.compile(r"([A-Za-z0-9._-]+)/[0-9]+:[0-9]+")
_OF_FILE = re.compile(r"([^/]+):[0-9]+", re.DOTALL)
_IN_PART = {"too_long", "broken_file"}
"""Reasons why a reject of a file does not hold the whole record."""


class Choice(NamedTuple):
    """Which rejects: of these reasons, of this input; of all where None."""

    reasons: frozenset[str] | None = None
    input: Input | None = None


ALL = Choice()


class Listing(NamedTuple):
    """Rejects by reason (`counts`), how many of them were sent again (`again`), and the newest, newest first."""

    counts: Counter[str]
    again: Counter[str]
    newest: list[Reject]


class RejectLog:
    """The rejects of one job."""

    def __init__(self, job: Job, run: RunDirectory) -> None:
        sink = output_sinks(job, run.path).get("rejects")
        if sink is None:
            raise JobError(f"{job.name} keeps no rejects: Outputs(rejects=None)")
        self.job = job
        self.sink: Sink = sink
        self._origins = Origins(job)

    def read(self, choice: Choice = ALL) -> Iterator[tuple[int, Reject]]:
        """Those chosen, each with a number that is greater for later ones. Raises what `Sink.rejects` does."""
        for number, record in self.sink.rejects(self.job.name):
            if choice.reasons is not None and record.reason not in choice.reasons:
                continue
            if choice.input is not None and self._origins.of(record.place) != choice.input:
                continue
            yield number, record

    def look(self, choice: Choice, limit: int, sent: Sent) -> Listing:
        """Counts of those chosen, and the newest."""
        listing = Listing(Counter(), Counter(), [])
        newest: list[tuple[int, int, Reject]] = []
        for position, (number, record) in enumerate(self.read(choice)):
            listing.counts[record.reason] += 1
            if record in sent:
                listing.again[record.reason] += 1
            # `position` differs, so that no two records are ever compared.
            if len(newest) < limit:
                heapq.heappush(newest, (number, position, record))
            elif limit:
                heapq.heappushpop(newest, (number, position, record))
        listing.newest.extend(record for *_, record in sorted(newest, reverse=True, key=lambda item: item[:2]))
        return listing


class Origins:
    """Which input of a job a reject came from, by its place."""

    def __init__(self, job: Job) -> None:
        inputs: list[tuple[Input, Source | None]] = [("events", job.events), ("labels", job.label.source)]
        self.sources: dict[Input, Source] = {kind: source for kind, source in inputs if source is not None}
        self.topics: dict[str, Input] = {s.topic: kind for kind, s in self.sources.items() if isinstance(s, Kafka)}
        self.files: list[Input] = [kind for kind, s in self.sources.items() if not isinstance(s, Kafka)]

    def of(self, place: str) -> Input | None:
        """The input; None where the job has no such input now, or the place is not a record's (but a model's)."""
        if (found := _OF_TOPIC.fullmatch(place)) is not None:
            return self.topics.get(found[1])
        if (found := _OF_FILE.fullmatch(place)) is None:
            return None
        if len(self.files) == 1:
            return self.files[0]
        return next((kind for kind in self.files if found[1] in self._names(kind)), None)

    def _names(self, kind: Input) -> list[str]:
        source = self.sources[kind]
        try:
            return source.names()
        except FileNotFoundError:  # moved away since
            return [source.path.name] if isinstance(source, LineFile) else []


# -- what was sent again


class Sent:
    """The records that were sent again before: `state/resubmitted.jsonl`. One process at a time may add to it."""

    def __init__(self, run: RunDirectory) -> None:
        self.path = run.state / "resubmitted.jsonl"
        self._known = {(place, crc) for place, crc in self._read()}
        self._descriptor: int | None = None

    def _read(self) -> Iterator[tuple[str, int]]:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=tuple[str, int])
            except msgspec.DecodeError:
                continue  # torn: its record counts as not sent

    def __contains__(self, record: Reject) -> bool:
        return _identity(record) in self._known

    def begin(self) -> None:
        """Before the first `add`. Raises `JobError` where another process is at it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise JobError(f"rejects are being sent again by another process, which uses {self.path}") from None
        self._known |= set(self._read())

    def add(self, records: Iterable[Reject]) -> None:
        """Remember records, through a loss of power too."""
        assert self._descriptor is not None
        new = [_identity(record) for record in records]
        if new:
            # A line that was torn ends here.
            os.write(self._descriptor, b"\n" + b"".join([msgspec.json.encode(each) + b"\n" for each in new]))
            os.fsync(self._descriptor)
            self._known.update(new)

    def close(self) -> None:
        """Give the file up."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _identity(record: Reject) -> tuple[str, int]:
    """A place alone may come again: in a topic that was made anew, in a file that was replaced."""
    return record.place, crc32(record.original_bytes())


# -- sending again


class Target(ABC):
    """Where records are sent again."""

    name: str

    @abstractmethod
    def send(self, records: list[Reject]) -> Iterator[tuple[int, str | None]]:
        """For each record its number and None once it is there to stay, else what is wrong."""

    def close(self) -> None:  # noqa: B027 - a file is open only while it is written
        """Give up connections."""


class TopicTarget(Target):
    """The topic that records were read from."""

    def __init__(self, source: Kafka) -> None:
        from dataflows.connectors.kafka.returning import Returning

        self.name = source.describe()
        self._returning = Returning(source)

    def send(self, records: list[Reject]) -> Iterator[tuple[int, str | None]]:
        return self._returning.send([(record.place, record.message()) for record in records])

    def close(self) -> None:
        self._returning.close()


class FileTarget(Target):
    """A file that their lines are appended to; of CSV it begins with the header that they had."""

    def __init__(self, path: Path, source: Source) -> None:
        if path.suffix == ".gz":
            raise JobError(f"--to {path}: lines are appended as they are, not compressed. Hint: another name")
        self.name = str(path)
        self._path = path
        self._source = source
        self._headers: dict[str, bytes | None] = {}

    def send(self, records: list[Reject]) -> Iterator[tuple[int, str | None]]:
        faults: dict[int, str] = {}
        ends_open, header = self._there()
        lines = [b"\n"] if ends_open else []
        for number, record in enumerate(records):
            wanted = self._header(record.place.rpartition(":")[0])
            if wanted is None:
                faults[number] = "its file is gone, and with it the header line that it needs"
            elif wanted and header is not None and header != wanted:
                faults[number] = f"its header line is not that of {self._path}"
            else:
                if wanted and header is None:
                    header = wanted
                    lines.append(header + b"\n")
                lines.append(record.original_bytes() + b"\n")
        fault = self._append(b"".join(lines)) if len(faults) < len(records) else None
        for number in range(len(records)):
            yield number, faults.get(number, fault)

    def _append(self, text: bytes) -> str | None:
        """Append durably, all or nothing; what went wrong."""
        # Without a buffer, which would be written once more when the file is closed.
        with self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(text)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                with suppress(OSError):
                    file.truncate(size)
                return f"{self._path}: {error.strerror}"
        return None

    def _header(self, name: str) -> bytes | None:
        """The header line of the file that a record came from; None where that is gone."""
        if name not in self._headers:
            try:
                self._headers[name] = self._source.header(name) if isinstance(self._source, LineFile) else b""
            except (FileNotFoundError, StopIteration):
                self._headers[name] = None
        return self._headers[name]

    def _there(self) -> tuple[bool, bytes | None]:
        """Of the file: whether its last line lacks a break, and its first line, None where it is empty."""
        if not self._path.exists() or not self._path.stat().st_size:
            return False, None
        with self._path.open("rb") as file:
            first = file.readline().rstrip(b"\r\n")
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n", first


class Resubmission:
    """Sends the originals of rejects to the inputs they came from, oldest first.

    Parameters
    ----------
    rejects, choice
        Which.
    sent
        What was sent before; that is left out, unless `again`.
    to
        The file for records of files; those of topics go back to their topic.
    limit
        How many to send at most.

    Raises `JobError` where it is not clear where to.
    """

    def __init__(
        self, rejects: RejectLog, choice: Choice, sent: Sent,
        to: Path | None = None, limit: int | None = None, again: bool = False,
    ) -> None:  # fmt: skip
        self._rejects = rejects
        self._choice = choice
        self._sent = sent
        self._to = to
        self._limit = limit
        self._again = again
        self._origins = Origins(rejects.job)
        self._targets: dict[Input, Target] = {}
        self.counts: Counter[str] = Counter()
        """Records that were sent, by where to."""
        self.before = 0
        """Records that were left out because they were sent before."""
        self.left: Counter[str] = Counter()
        """Records that cannot be sent, by why."""
        self.failed = 0
        self.fault: str | None = None
        """What was wrong with the first that failed."""
        self._check_where()

    def _check_where(self) -> None:
        wanted = [kind for kind in self._origins.sources if self._choice.input in (None, kind)]
        files = [kind for kind in wanted if kind in self._origins.files]
        narrower = " or --input" if len(wanted) > 1 else ""
        if not wanted:
            raise JobError(f"--input {self._choice.input}: {self._rejects.job.name} has no such input")
        if not files and self._to is not None:
            raise JobError(f"--to {self._to}: records of topics go back to their topic. Hint: leave --to out")
        if files and self._to is None:
            raise JobError(
                f"the {' and '.join(files)} of {self._rejects.job.name} come from files, which are not changed. "
                f"Hint: --to FILE{narrower}: their lines are appended to that file"
            )
        if len(files) > 1:
            raise JobError(
                f"--to {self._to}: events and labels would come into one file. Hint: --input events or --input labels"
            )

    def run(self) -> None:
        """Send; what became of it is in the attributes, also when this raises."""
        self._sent.begin()
        try:
            pending: dict[Input, list[Reject]] = {}
            for kind, record in islice(self._chosen(), self._limit):
                batch = pending.setdefault(kind, [])
                batch.append(record)
                if len(batch) == BATCH and not self._send(kind, pending.pop(kind)):
                    return  # nothing gets through
            for kind, batch in pending.items():
                self._send(kind, batch)
        finally:
            self._sent.close()
            for target in self._targets.values():
                target.close()

    def _chosen(self) -> Iterator[tuple[Input, Reject]]:
        """What is to be sent, with the input it goes to."""
        seen: set[tuple[str, int]] = set()
        for _, record in self._rejects.read(self._choice):
            why = self._unfit(record)
            kind = self._origins.of(record.place)
            if why is not None or kind is None:
                self.left[why or "from no input that the job has now"] += 1
            elif (identity := _identity(record)) in seen or (record in self._sent and not self._again):
                self.before += 1
            else:
                seen.add(identity)
                yield kind, record

    def _unfit(self, record: Reject) -> str | None:
        if record.cut is not msgspec.UNSET:
            return "not kept whole"
        if _OF_TOPIC.fullmatch(record.place) is not None:
            message = record.message()
            return "without key and value" if message.value is None and message.key is None else None
        if _OF_FILE.fullmatch(record.place) is None:
            return "about an event or a model, not about a record"
        return "not kept whole" if record.reason in _IN_PART else None

    def _send(self, kind: Input, batch: list[Reject]) -> bool:
        """Whether any of it was acknowledged; it is remembered."""
        target = self._targets.get(kind) or self._targets.setdefault(kind, self._open(kind))
        acknowledged: list[Reject] = []
        try:
            for number, fault in target.send(batch):
                if fault is None:
                    acknowledged.append(batch[number])
                else:
                    self.failed += 1
                    self.fault = self.fault or f"{batch[number].place}: {fault}"
        finally:
            self.counts[target.name] += len(acknowledged)
            self._sent.add(acknowledged)
        return bool(acknowledged)

    def _open(self, kind: Input) -> Target:
        source = self._origins.sources[kind]
        if isinstance(source, Kafka):
            return TopicTarget(source)
        assert self._to is not None
        return FileTarget(self._to, source)
