"""Job → Bytewax graph: thin adapters between the engine and the logic of the other modules.

    read ─▶ features (entities side by side) ─▶ learner ─▶ publish ─▶ write
      └────────────── questions ─────────────────┘            │
      └────────────── rejects ────────────────────────────────┘

The protocol of a batch:

1. `read` (one source partition) reads, orders and admits a batch; what the steps have to do travels as bundles, one for
   each key group that has anything to do. Bundles of a batch leave in one engine activation, so within one epoch.
2. A feature step answers a bundle with its columns, for each learner group that waits for them.
3. A learner works on a batch when its head and all the columns the head names have come, in the order of batches.
4. `publish` puts together what the learners said, in the order of the batch, updates the metrics and encodes lines.
   Then it gives back the credit: the reader lets only so many batches be under way.

Key groups are the engine's keys. Their strings are chosen so that the engine's hash spreads groups evenly over workers
and puts the same group of every step on the same worker.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import time as wall
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from pydantic import BaseModel, ConfigDict, Field

from dataflows.admit import GLOBAL_GROUP, Admit, Work
from dataflows.connectors.files import Jsonl
from dataflows.evaluate import Publisher
from dataflows.events import Metrics, Outcome, Prediction, Reject, encode, encode_lines
from dataflows.job import KINDS, Job, JobError, Sink
from dataflows.learner import Learner
from dataflows.order import Reader
from dataflows.orderlog import OrderLog
from dataflows.replay import SWEEP_EVERY, answer_rows, empties_of, empty_columns, entity_features, inputs_of

_KIND_OF = {Prediction: "predictions", Outcome: "outcomes", Metrics: "metrics", Reject: "rejects"}


class Settings(BaseModel):
    """How a job runs; none of it changes results.

    Parameters
    ----------
    directory
        The run's directory: outputs, and in `state/` what a resume needs. Default `runs/NAME`.
    batch_size
        Items in a batch at the most.
    linger
        Seconds an item may wait for its batch to fill.
    groups
        Key groups; fixed when the job's state is created.
    in_flight
        Batches under way at once.
    follow
        Wait for more at the end of files instead of ending.
    resume
        Keep the order log and outputs of the run before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path | None = None
    batch_size: int = Field(default=1000, gt=0)
    linger: float = Field(default=0.05, ge=0)
    groups: int = Field(default=16, gt=0, le=1024)
    in_flight: int = Field(default=8, gt=0)
    follow: bool = False
    resume: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the launcher hands to its workers in `MILLRACE_SETTINGS`."""
        text = os.environ.get("MILLRACE_SETTINGS")
        return cls.model_validate_json(text) if text else cls()


def run_directory(job: Job, settings: Settings) -> Path:
    """Where a job's outputs and state lie."""
    return settings.directory or job.outputs.directory or Path("runs") / job.name


def output_sinks(job: Job, directory: Path) -> dict[str, Sink]:
    """The sink of each kind of record that is not switched off."""
    sinks: dict[str, Sink] = {}
    for kind in KINDS:
        declared = getattr(job.outputs, kind)
        if declared is not None:
            sinks[kind] = Jsonl(directory / f"{kind}.jsonl") if type(declared) is Sink else declared
    paths = [sink.path.resolve() for sink in sinks.values() if isinstance(sink, Jsonl)]
    for path in paths:
        if paths.count(path) > 1:
            raise JobError(f"Outputs: two kinds of records go to {path}. Hint: a file holds one kind")
    return sinks


def dataflow(job: Job, settings: Settings | None = None) -> Dataflow:
    """The Bytewax dataflow of a job, for `python -m bytewax.run examples.NAME.job:flow` and for the launcher."""
    settings = settings or Settings.from_environment()
    directory = run_directory(job, settings)
    control = Control(directory / "state" / "control")
    flow = Dataflow(job.name)
    works = op.input("read", flow, ReadSource(job, settings, directory, control))
    gathered = [op.flat_map_batch("questions", works, _heads)]
    for index, name in enumerate(entity_step_names(job)):
        bundles = op.flat_map_batch(f"rows_{name}", works, _bundles_of(index))
        answered = op.stateful_batch(f"features_{name}", bundles, _build(FeatureStep, job, index))
        gathered.append(op.flat_map_batch(f"columns_{name}", answered, _rekey))
    said = op.stateful_batch("learner", op.merge("gather", *gathered), _build(LearnerStep, job))
    heads = op.flat_map_batch("batches", works, _publisher_heads)
    parts = op.merge("said", heads, op.flat_map_batch("to_publish", said, _rekey))
    published = op.stateful_batch("publish", parts, _build(PublishStep, job, control, directory))
    sinks = output_sinks(job, directory)
    op.output("write", op.flat_map_batch("lines", published, _rekey), RecordsSink(sinks))
    return flow


def entity_step_names(job: Job) -> list[str]:
    """A name for each Entity declaration, from its key; told apart by what it observes, then by number.

    The engine keeps state by these names, so they must be unique and must not change by themselves.
    """
    names: list[str] = []
    for entity in job.entities:
        options = [entity.label, f"{entity.label}_of_{entity.of}"]
        options += [f"{options[1]}_{number}" for number in range(2, len(job.entities) + 2)]
        names.append(next(option for option in options if option not in names))
    return names


def _build(step: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    return lambda state: step(*arguments, state)


def _rekey(items: list[tuple[str, Any]]) -> Iterable[Any]:
    """(key, (next key, item)) → (next key, item)."""
    return [item for _, item in items]


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
    rows: list[Any]
    home: int
    owners: list[int] | None
    clock: int | None


class Head(msgspec.Struct, array_like=True, gc=False):
    """A batch's operations for one learner group, and from how many feature bundles columns will come."""

    number: int
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


class SaidPart(msgspec.Struct, array_like=True, gc=False):
    """What one learner said of a batch."""

    number: int
    said: list[Any]


def _heads(works: list[Work]) -> Iterable[tuple[str, Head]]:
    for work in works:
        for group, operations in work.learners.items():
            parts = len(work.reads.get(group, ()))
            yield group_key(group), Head(work.number, work.questions, operations, parts)


def _bundles_of(index: int) -> Callable[[list[Work]], Iterable[tuple[str, Bundle]]]:
    def bundles(works: list[Work]) -> Iterable[tuple[str, Bundle]]:
        for work in works:
            owners = work.owners if len(work.reads) > 1 else None
            home = next(iter(work.reads), 0)
            for (entity, group), rows in work.features.items():
                if entity == index:
                    yield group_key(group), Bundle(work.number, rows, home, owners, work.clock)

    return bundles


def _publisher_heads(works: list[Work]) -> Iterable[tuple[str, PublisherHead]]:
    for work in works:
        yield _PUBLISH, PublisherHead(work.number, work.rejects, len(work.learners), work.end, work.status)


_PUBLISH = group_key(GLOBAL_GROUP)
"""Publish sits on the worker of the global model, so that what it said need not travel."""


# -- steps


class ReadSource(FixedPartitionedSource[Work, bytes]):
    """One engine partition that reads all of a job's inputs."""

    def __init__(self, job: Job, settings: Settings, directory: Path, control: Control) -> None:
        self._job = job
        self._settings = settings
        self._directory = directory
        self._control = control

    def list_parts(self) -> list[str]:
        return ["reader"]

    def build_part(self, step_id: str, for_part: str, resume_state: bytes | None) -> ReadPartition:
        return ReadPartition(self._job, self._settings, self._directory, self._control, resume_state)


class ReadPartition(StatefulSourcePartition[Work, bytes]):
    """Reader and admit behind the engine's interface."""

    def __init__(self, job: Job, settings: Settings, directory: Path, control: Control, state: bytes | None) -> None:
        reader_state, admit_state = pickle.loads(state) if state is not None else (None, None)
        log_file = directory / "state" / "order.log"
        if not settings.resume:
            _refuse_launched_state(directory)
            if state is None:
                log_file.unlink(missing_ok=True)
        self._control = control
        self._in_flight = settings.in_flight
        self._reader = Reader(
            inputs_of(job),
            job.time,
            settings.batch_size,
            settings.linger,
            settings.follow,
            OrderLog(log_file),
            reader_state,
        )
        self._admit = Admit(job, settings.groups, admit_state)
        self._pause: float = 0.0
        control.published = self._reader.number

    def next_batch(self) -> list[Work]:
        if self._control.stopping or self._reader.finished:
            raise StopIteration
        if self._reader.number - self._control.published >= self._in_flight:
            self._pause = 0.0005
            return []
        batch = self._reader.next_batch()
        if batch is None:
            if self._reader.finished:
                raise StopIteration
            self._pause = 0.005
            return []
        self._pause = 0.0
        work = self._admit.admit(batch)
        work.status = {
            "clock": work.clock,
            "watermark": batch.watermark,
            "open": len(self._admit),
            "read": self._reader.counts["read"],
            "questions": self._admit.questions,
            "late_events": self._admit.counts["late_events"],
            "end": batch.end,
        }
        return [work]

    def next_awake(self) -> datetime | None:
        return datetime.now(UTC) + timedelta(seconds=self._pause) if self._pause else None

    def snapshot(self) -> bytes:
        return pickle.dumps((self._reader.snapshot(), self._admit.snapshot()), 5)

    def close(self) -> None:
        self._reader.close()


def _refuse_launched_state(directory: Path) -> None:
    """The engine's own runner knows nothing of the launcher's checks, so it may not touch what a launcher keeps."""
    if (directory / "state" / "recovery").exists():
        raise RuntimeError(
            f"{directory} holds the state of a `millrace run`. Hint: go on with `millrace run`, or move it away"
        )


class FeatureStep(StatefulBatchLogic[Bundle, tuple[str, Part], bytes]):
    """One key group of the entities of one declaration."""

    def __init__(self, job: Job, index: int, state: bytes | None) -> None:
        self._index = index
        self._features = entity_features(job, index)
        if state is not None:
            self._features.restore(state)

    def on_batch(self, values: list[Bundle]) -> tuple[list[tuple[str, Part]], bool]:
        parts: list[tuple[str, Part]] = []
        for bundle in values:
            places, answers = answer_rows(self._features, bundle.rows)
            if places:
                parts.extend(self._address(bundle, places, answers))
            if bundle.number % SWEEP_EVERY == 0 and bundle.clock is not None:
                self._features.sweep(bundle.clock)
        return parts, StatefulBatchLogic.RETAIN

    def _address(self, bundle: Bundle, places: list[int], answers: list[Any]) -> Iterable[tuple[str, Part]]:
        """To each learner group the values of its questions."""
        if bundle.owners is None:
            yield group_key(bundle.home), Part(bundle.number, self._index, places, answers)
            return
        by_owner: dict[int, tuple[list[int], list[Any]]] = {}
        for place, answer in zip(places, answers, strict=True):
            mine = by_owner.setdefault(bundle.owners[place], ([], []))
            mine[0].append(place)
            mine[1].append(answer)
        for owner, (its_places, its_answers) in by_owner.items():
            yield group_key(owner), Part(bundle.number, self._index, its_places, its_answers)

    def snapshot(self) -> bytes:
        return self._features.snapshot()


class LearnerStep(StatefulBatchLogic[Head | Part, tuple[str, SaidPart], bytes]):
    """One key group of models: waits until all columns of a batch have come, then works on it."""

    def __init__(self, job: Job, state: bytes | None) -> None:
        self._learner = Learner(job, state)
        self._empties = empties_of(job)
        self._heads: dict[int, Head] = {}
        self._parts: dict[int, list[Part]] = {}

    def on_batch(self, values: list[Head | Part]) -> tuple[list[tuple[str, SaidPart]], bool]:
        for value in values:
            if type(value) is Head:
                self._heads[value.number] = value
            else:
                self._parts.setdefault(value.number, []).append(value)  # type: ignore[arg-type]
        said: list[tuple[str, SaidPart]] = []
        for number in sorted(self._heads):
            # In the order of batches: heads come in order, so an incomplete one is the next to work on.
            if len(self._parts.get(number, ())) < self._heads[number].parts:
                break
            said.append((_PUBLISH, self._work_on(self._heads.pop(number), self._parts.pop(number, []))))
        return said, StatefulBatchLogic.RETAIN

    def _work_on(self, head: Head, parts: list[Part]) -> SaidPart:
        columns = empty_columns(self._empties, head.questions)
        for part in parts:
            column = columns[part.entity]
            for place, answer in zip(part.places, part.answers, strict=True):
                column[place] = answer
        return SaidPart(head.number, self._learner.process(head.operations, columns))

    def snapshot(self) -> bytes:
        _assert_nothing_waits(self._heads, self._parts)
        return self._learner.snapshot()


class PublishStep(StatefulBatchLogic[PublisherHead | SaidPart, tuple[str, bytes], bytes]):
    """Puts a batch's records together and encodes them as (kind, lines); gives the credit back."""

    def __init__(self, job: Job, control: Control, directory: Path, state: bytes | None) -> None:
        self._publisher = Publisher(job, state)
        self._control = control
        self._status = StatusFile(directory / "state" / "status.json")
        self._heads: dict[int, PublisherHead] = {}
        self._parts: dict[int, list[SaidPart]] = {}

    def on_batch(self, values: list[PublisherHead | SaidPart]) -> tuple[list[tuple[str, bytes]], bool]:
        for value in values:
            if type(value) is PublisherHead:
                self._heads[value.number] = value
            else:
                self._parts.setdefault(value.number, []).append(value)  # type: ignore[arg-type]
        lines: list[tuple[str, bytes]] = []
        for number in sorted(self._heads):
            if len(self._parts.get(number, ())) < self._heads[number].learners:
                break
            lines.extend(self._publish(self._heads.pop(number), self._parts.pop(number, [])))
        return lines, StatefulBatchLogic.RETAIN

    def _publish(self, head: PublisherHead, parts: list[SaidPart]) -> Iterable[tuple[str, bytes]]:
        kinds: dict[Any, list[Any]] = {}
        for record in self._publisher.publish(head.rejects, [part.said for part in parts], head.end):
            kind = type(record)
            if kind in kinds:
                kinds[kind].append(record)
            else:
                kinds[kind] = [record]
        self._control.published = head.number
        self._status.write(head, self._publisher)
        return [(_KIND_OF[kind], encode_lines(records)) for kind, records in kinds.items()]

    def snapshot(self) -> bytes:
        _assert_nothing_waits(self._heads, self._parts)
        return self._publisher.snapshot()


def _assert_nothing_waits(heads: dict[int, Any], parts: dict[int, Any]) -> None:
    """A batch lies within one epoch, so at a snapshot nothing may be half done."""
    if heads or parts:
        raise RuntimeError(f"at a snapshot batches {sorted(set(heads) | set(parts))} were incomplete: a bug")


# -- outputs


class RecordsSink(FixedPartitionedSink[bytes, int]):
    """One engine partition per kind of record, behind it the declared sink."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks

    def list_parts(self) -> list[str]:
        return list(KINDS)

    def part_fn(self, item_key: str) -> int:
        return sorted(KINDS).index(item_key)  # the engine numbers partitions in the order of their names

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> WritePartition:
        return WritePartition(self._sinks.get(for_part), resume_state)


class WritePartition(StatefulSinkPartition[bytes, int]):
    """A sink's writer behind the engine's interface."""

    def __init__(self, sink: Sink | None, position: int | None) -> None:
        self._writer = sink.writer(position) if sink is not None else None

    def write_batch(self, values: list[bytes]) -> None:
        if self._writer is not None:
            for chunk in values:
                self._writer.write(chunk)
            self._writer.flush()

    def snapshot(self) -> int:
        return self._writer.position() if self._writer is not None else 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


# -- what workers and the launcher share


class Control:
    """Two numbers shared by all processes of a run: the newest published batch, and whether to stop.

    A memory-mapped file, because the reader and the publisher may sit in different processes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < 16:
                file.truncate(16)
            self._map = mmap.mmap(file.fileno(), 16)

    def restart(self) -> None:
        """Forget an old wish to stop; before any process of a run is started."""
        self._map[8] = 0

    @property
    def published(self) -> int:
        """Number of the newest batch that went all the way."""
        return struct.unpack_from("<q", self._map, 0)[0]  # type: ignore[no-any-return]

    @published.setter
    def published(self, number: int) -> None:
        struct.pack_into("<q", self._map, 0, number)

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop after its current batch, with a last checkpoint."""
        return self._map[8] != 0

    def stop(self) -> None:
        """Ask the reader to stop."""
        self._map[8] = 1


class StatusFile:
    """What people see of a run: written a few times a second, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def write(self, head: PublisherHead, publisher: Publisher) -> None:
        now = wall.monotonic()
        if now < self._next and not head.end:
            return
        self._next = now + 0.25
        status = head.status | {
            "batch": head.number,
            "counts": dict(publisher.counts),
            "outcomes": publisher.evaluator.outcomes,
            "metrics": publisher.evaluator.values(),
        }
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(encode(status))
        temporary.replace(self._path)
