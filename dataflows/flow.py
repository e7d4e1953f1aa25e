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

What travels, and to which worker, is in `dataflows.routing`.
"""

from __future__ import annotations

import os
import sys
import time as wall
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from dataflows.admit import GLOBAL_GROUP, Admit, Work
from dataflows.bundle import models_of
from dataflows.changes import declared, gone_names
from dataflows.control import Control, Phase, StatusFile
from dataflows.evaluate import Publisher
from dataflows.events import Message, Prediction
from dataflows.job import KIND_OF, KINDS, Job, Output, Sink, SinkWriter
from dataflows.learner import Learner
from dataflows.learnlog import LearnLog
from dataflows.learnstore import LearnWriter, learn_file
from dataflows.order import Batch, Reader
from dataflows.orderlog import OrderLog
from dataflows.pickles import names_of
from dataflows.replay import SWEEP_EVERY, answer_rows, empties_of, empty_columns, entity_features, inputs_of
from dataflows.routing import (
    PUBLISH,
    Bundle,
    Head,
    Part,
    PublisherHead,
    SaidPart,
    Tick,
    bundles_of,
    group_key,
    learner_heads,
    publisher_heads,
    siphash13,
)
from dataflows.rows import entity_step_names
from dataflows.settings import FeaturePart, RunDirectory, Settings, output_sinks
from dataflows.state import READER, StateStore, StepRows, StepState, group_file, sync
from dataflows.tally import Tally
from features.parts import FeatureParts
from features.state import EntityFeatures

FLUSH, FLUSH_LIVE = 1024, 256
"""Changed entities after which a step writes to the state store before a checkpoint asks for it: so the checkpoint
itself finds little left to write. Fewer where batches are small, as there events must not wait."""

FLUSH_QUESTIONS, FLUSH_QUESTIONS_LIVE = 8192, 1024
"""The same of questions that came and went: those that do both in between are never written."""


def _flush_at(items: int, batch_size: int) -> int:
    """`FLUSH` of a batch of so many items."""
    return FLUSH if items >= batch_size // 2 else FLUSH_LIVE


def _flush_questions_at(items: int, batch_size: int) -> int:
    """`FLUSH_QUESTIONS` of a batch of so many items."""
    return FLUSH_QUESTIONS if items >= batch_size // 2 else FLUSH_QUESTIONS_LIVE


LAG_S = 0.25
"""Seconds between two looks at how far inputs are behind."""

SHOWN_MODELS = 100
"""Of so many models people see the version."""

STATUS_S = 0.3
"""Seconds of silence after which the last batch is told."""


def dataflow(job: Job, settings: Settings | None = None) -> Dataflow:
    """The Bytewax dataflow of a job, for `python -m bytewax.run examples.NAME.job:flow` and for the launcher."""
    settings = settings or Settings.from_environment()
    run = Run(job, settings)
    flow = Dataflow(job.name)
    works = op.input("read", flow, ReadSource(run))
    gathered = [op.flat_map_batch("questions", works, learner_heads)]
    for index, name in enumerate(entity_step_names(job)):
        bundles = op.flat_map_batch(f"rows_{name}", works, bundles_of(index))
        answered = op.stateful_batch(f"features_{name}", bundles, run.build(FeatureStep, index, name))
        gathered.append(op.flat_map_batch(f"columns_{name}", answered, _rekey))
    said = op.stateful_batch("learner", op.merge("gather", *gathered), run.build(LearnerStep))
    heads = op.flat_map_batch("batches", works, publisher_heads)
    parts = op.merge("said", heads, op.flat_map_batch("to_publish", said, _rekey))
    published = op.stateful_batch("publish", parts, run.build(PublishStep))
    op.output("write", op.flat_map_batch("lines", published, _rekey), RecordsSink(run))
    return flow


class Run:
    """What all steps of one process share: the job, how it runs, and the state store where there is one.

    There is none when the engine's own runner starts the flow: then nothing outlives the run.
    """

    def __init__(self, job: Job, settings: Settings) -> None:
        self.job = job
        self.settings = settings
        self.directory = RunDirectory.of(job, settings)
        self.sinks = output_sinks(job, self.directory.path)
        self.start = settings.start
        self.store: StateStore | None = None
        if self.start is None:
            _refuse_recovery()
            _refuse_launched_state(self.directory)
            _refuse_checkpointed_outputs(self.sinks)
        else:
            gone = gone_names(self.start.layout, job)
            self.store = StateStore(self.directory.groups, self.start.lineage, allowed=names_of(job), gone=gone)
        self.control = Control(self.directory.control)

    def state(self, file: str, step: str) -> StepState | None:
        """Where a step keeps its rows."""
        return None if self.store is None else self.store.step(file, step)

    def parts(self, step: str) -> tuple[FeaturePart, ...]:
        """The parts of a feature step's state; none where nothing is kept."""
        return () if self.start is None else self.start.layout.features[step]

    def order_log(self) -> OrderLog:
        """The order log of this branch."""
        path = self.directory.order_log(1 if self.start is None else self.start.branch)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.start is None:
            path.unlink(missing_ok=True)
        return OrderLog(path)

    def build(self, step: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
        """A step's builder; the engine hands it the last batch of its state, which the launcher has compared."""

        def built(batch: int | None) -> Any:
            if batch is not None and self.store is None:
                raise RuntimeError(_NO_RECOVERY)
            return step(self, *arguments, batch or 0)

        return built

    def sync(self) -> None:
        """Make this checkpoint survive a power loss, if that was asked for."""
        if self.start is None or self.settings.durability == "process":
            return
        sync(self.directory.groups, self.directory.learned)
        descriptor = os.open(self.directory.order_log(self.start.branch), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_NO_RECOVERY = (
    "a job keeps its state in a store of its own, which the engine's recovery does not cover. "
    "Hint: `millrace run JOB` checkpoints and resumes; leave -r out to run without checkpoints"
)


def _refuse_recovery() -> None:
    """`python -m bytewax.run -r` would promise what it cannot keep: refuse at once, not when it is needed."""
    asked = [word for word in sys.argv[1:] if word.startswith(("-r", "--recovery-directory"))]
    if Path(sys.argv[0]).parts[-2:] == ("bytewax", "run.py") and (
        asked or os.environ.get("BYTEWAX_RECOVERY_DIRECTORY")
    ):
        raise RuntimeError(_NO_RECOVERY)


def _refuse_launched_state(directory: RunDirectory) -> None:
    """The engine's own runner knows nothing of the launcher's checks, so it may not touch what a launcher keeps."""
    if directory.job.exists():
        raise RuntimeError(
            f"{directory.path} holds the state of a `millrace run`. Hint: go on with `millrace run`, or move it away"
        )


def _refuse_checkpointed_outputs(sinks: dict[str, Sink]) -> None:
    """Without checkpoints there is none to publish by."""
    for kind, sink in sinks.items():
        if sink.by_checkpoint:
            raise RuntimeError(
                f"the {kind} go to {sink.where()}, which publishes by the checkpoint, and the engine's own runner "
                "makes none. Hint: `millrace run`, or mode='immediate'"
            )


def _rekey(items: list[tuple[str, Any]]) -> Iterable[Any]:
    """(key, (next key, item)) → (next key, item)."""
    return [item for _, item in items]


# -- steps


class ReadSource(FixedPartitionedSource[Work | Tick, bytes]):
    """One engine partition that reads all of a job's inputs."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def list_parts(self) -> list[str]:
        return ["reader"]

    def build_part(self, step_id: str, for_part: str, resume_state: bytes | None) -> ReadPartition:
        if resume_state is not None and self._run.store is None:
            raise RuntimeError(_NO_RECOVERY)
        return ReadPartition(self._run)


class ReadPartition(StatefulSourcePartition[Work | Tick, bytes]):
    """Reader and admit behind the engine's interface."""

    def __init__(self, run: Run) -> None:
        job, settings = run.job, run.settings
        self._control = run.control
        self._control.workers = Phase.START
        self._in_flight = settings.in_flight
        self._batch_size = settings.batch_size
        self._read_state = run.state(READER, "read")
        self._admit_state = run.state(READER, "admit")
        self._reader = Reader(
            inputs_of(job),
            job.time,
            settings.batch_size,
            settings.linger,
            settings.read,
            run.order_log(),
            _rows(self._read_state),
        )
        self._admit = Admit(job, settings.groups, _rows(self._admit_state))
        self._pause: float = 0.0
        self._resumes = False
        self._between = True  # at the beginning of an epoch, of which the engine has not asked for a batch yet
        self._ticks = any(sink.by_checkpoint for sink in run.sinks.values())
        self._lag_at = 0.0
        self._lag: dict[str, int] = {}
        self._offsets: dict[str, int] = {}
        self._in_checkpoint: dict[str, Any] = {}
        run.control.published = self._reader.number

    def next_batch(self) -> list[Work | Tick]:
        if self._between:
            # The engine asks again only when the epoch before is complete, its own writes included: so the checkpoint
            # that ended it is one to go on from.
            self._between = False
            self._control.workers = Phase.RUNNING
            if self._in_checkpoint:
                self._reader.note_checkpoint(self._in_checkpoint)
            if self._ticks:
                return [Tick()]
        if self._control.stopping or self._reader.finished:
            raise StopIteration
        if self._reader.number - self._control.published >= self._in_flight:
            self._pause = 0.0005
            return []
        batch = self._reader.next_batch()
        if batch is None:
            if self._reader.finished:
                raise StopIteration
            self._pause = 0.002
            return []
        if self._resumes:
            self._resumes = False
            self._control.note_resumed()
        self._pause = 0.0
        work = self._admit.admit(batch)
        limit = _flush_questions_at(len(batch.items), self._batch_size)
        if self._admit_state is not None and self._admit.unsaved >= limit:
            self._admit_state.write(batch.number, self._admit.changes())
        work.status = self._describe(batch, work)
        return [work]

    def _describe(self, batch: Batch, work: Work) -> dict[str, Any]:
        """What people see of the reader, as of a batch."""
        now = wall.monotonic()
        if now >= self._lag_at:
            self._lag_at = now + LAG_S
            self._lag = self._reader.lag()
            self._offsets = {name: at for name, at in self._reader.offsets().items() if type(at) is int}
        counts = self._reader.counts
        return {
            "clock": work.clock,
            "watermark": batch.watermark,
            "open": len(self._admit),
            "read": counts["read"],
            "questions": self._admit.questions,
            "late_events": self._admit.counts["late_events"],
            "tombstones": counts["tombstones"],
            "gap": counts["gap"],
            "lag": self._lag,
            "position": self._offsets,
            "end": batch.end,
            "came": _oldest_arrival(batch),
        }

    def next_awake(self) -> datetime | None:
        return datetime.now(UTC) + timedelta(seconds=self._pause) if self._pause else None

    def snapshot(self) -> bytes:
        """Keep all state in the store; to the engine goes what a checkpoint's manifest tells people, as JSON."""
        self._control.workers = Phase.SNAPSHOT
        self._resumes = self._between = True
        number = self._reader.number
        if self._read_state is not None and self._admit_state is not None:
            self._read_state.write(number, self._reader.changes(), complete=True)
            self._admit_state.write(number, self._admit.changes(), complete=True)
        offsets = self._in_checkpoint = self._reader.offsets()
        return msgspec.json.encode(
            {
                "batch": number,
                "offsets": offsets,
                "watermark": self._reader.watermark,
                "clock": self._admit.clock,
                "newest": self._admit.newest,
                "read": self._reader.counts["read"],
                "questions": self._admit.questions,
                "open": len(self._admit),
            }
        )

    def close(self) -> None:
        self._reader.close()


def _oldest_arrival(batch: Batch) -> float | None:
    """The input's timestamp of the record of a batch that has waited longest (s since 1970); None without any."""
    times = [item[6].timestamp for item in batch.items if type(item[6]) is Message]
    return min(times) / 1000 if times else None


def _rows(state: StepState | None) -> StepRows | None:
    return None if state is None else state.rows


class FeatureStep(StatefulBatchLogic[Bundle, tuple[str, Part], int]):
    """One key group of the entities of one declaration."""

    def __init__(self, run: Run, index: int, name: str, batch: int) -> None:
        self._run = run
        self._index = index
        self._step = f"features_{name}"
        self._features: EntityFeatures | FeatureParts | None = None
        self._kept: list[tuple[EntityFeatures, StepState]] = []
        self._number = batch  # the engine asks for a snapshot after a resume too, before anything came

    def _open(self, group: int) -> EntityFeatures | FeatureParts:
        """The key group is known only when the first bundle comes."""
        run, job = self._run, self._run.job
        cache = max(run.settings.cache // run.settings.groups, 1)
        declaration = job.entities[self._index]
        parts = []
        for part in run.parts(self._step):
            state = run.state(group_file(group), part.rows)
            features = entity_features(job, declared(part, job), _rows(state), cache)
            parts.append((features, part.names))
            if state is not None:
                self._kept.append((features, state))
        if not parts:
            self._features = entity_features(job, declaration)
        elif len(parts) == 1 and parts[0][1] == parts[0][0].names == declaration.feature_names:
            self._features = parts[0][0]
        else:
            self._features = FeatureParts(declaration, parts)
        return self._features

    def on_batch(self, values: list[Bundle]) -> tuple[list[tuple[str, Part]], bool]:
        parts: list[tuple[str, Part]] = []
        features = self._open(values[0].group) if self._features is None else self._features
        for bundle in values:
            places, answers = answer_rows(features, bundle.rows)
            if places:
                parts.extend(self._address(bundle, places, answers))
            if bundle.number % SWEEP_EVERY == 0 and bundle.clock is not None:
                features.sweep(bundle.clock)
            self._number = bundle.number
        settings = self._run.settings
        # A key group has its share of a batch's rows.
        if features.unsaved >= _flush_at(len(values[-1].rows) * settings.groups, settings.batch_size):
            self._write(complete=False)
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

    def _write(self, complete: bool) -> None:
        for features, state in self._kept:
            state.write(self._number, features.changes(), complete)
            features.trim()

    def snapshot(self) -> int:
        self._write(complete=True)
        return self._number


class LearnerStep(StatefulBatchLogic[Head | Part, tuple[str, SaidPart], int]):
    """One key group of models: waits until all columns of a batch have come, then works on it."""

    def __init__(self, run: Run, batch: int) -> None:
        self._run = run
        self._learner: Learner | None = None
        self._state: StepState | None = None
        self._learned: LearnWriter | None = None
        self._log: LearnLog | None = None
        self._empties = empties_of(run.job)
        self._heads: dict[int, Head] = {}
        self._parts: dict[int, list[Part]] = {}
        self._number = batch  # the engine asks for a snapshot after a resume too, before anything came

    def _open(self, group: int) -> Learner:
        run = self._run
        self._state = run.state(group_file(group), "learner")
        begun = 1 if run.start is None else run.start.layout.models
        if run.start is not None and run.job.audit is not None:
            path, maker = learn_file(run.directory, group), run.settings.maker
            self._learned = LearnWriter(path, run.start.lineage, begun, run.job.audit, maker)
            self._log = self._learned.log(run.job.feature_names)
        warm = models_of(run.job, run.directory)
        self._learner = Learner(run.job, _rows(self._state), begun, self._log, warm)
        return self._learner

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
            said.append((PUBLISH, self._work_on(self._heads.pop(number), self._parts.pop(number, []))))
        return said, StatefulBatchLogic.RETAIN

    def _work_on(self, head: Head, parts: list[Part]) -> SaidPart:
        learner = self._open(head.group) if self._learner is None else self._learner
        columns = empty_columns(self._empties, head.questions)
        for part in parts:
            column = columns[part.entity]
            for place, answer in zip(part.places, part.answers, strict=True):
                column[place] = answer
        said = learner.process(head.operations, columns)
        self._number = head.number
        limit = _flush_questions_at(head.questions, self._run.settings.batch_size)
        if learner.unsaved >= limit:
            self._write(complete=False)
        elif self._log is not None and len(self._log) >= limit:
            self._keep_log()
        return SaidPart(head.number, said)

    def _write(self, complete: bool) -> None:
        self._keep_log()
        if self._state is not None and self._learner is not None:
            self._state.write(self._number, self._learner.changes(models=complete), complete)

    def _keep_log(self) -> None:
        if self._learned is not None and self._log:
            self._learned.write(self._number, self._log.take())

    def snapshot(self) -> int:
        _assert_nothing_waits(self._heads, self._parts)
        self._write(complete=True)
        return self._number


class PublishStep(StatefulBatchLogic[PublisherHead | SaidPart | Tick, tuple[str, Any], int]):
    """Puts a batch's records together, encodes them as their outputs want them, gives the credit back.

    It emits (kind, what the kind's sink encoded), and (kind, None) for a tick.
    """

    def __init__(self, run: Run, batch: int) -> None:
        self._run = run
        self._state = run.state(group_file(GLOBAL_GROUP % run.settings.groups), "publish")
        begun = {} if run.start is None else run.start.layout.metrics
        self._publisher = Publisher(run.job, _rows(self._state), begun)
        self._control = run.control
        self._status = StatusFile(run.directory.status)
        self._measures = run.settings.measures
        self._latency, self._backlog = Tally(), Tally()
        self._untold: PublisherHead | None = None  # a batch that the status file does not know of
        self._heads: dict[int, PublisherHead] = {}
        self._parts: dict[int, list[SaidPart]] = {}
        self._number = batch  # the engine asks for a snapshot after a resume too, before anything came

    def on_batch(self, values: list[PublisherHead | SaidPart | Tick]) -> tuple[list[tuple[str, Any]], bool]:
        lines: list[tuple[str, Any]] = []
        for value in values:
            if type(value) is PublisherHead:
                self._heads[value.number] = value
            elif type(value) is SaidPart:
                self._parts.setdefault(value.number, []).append(value)
            else:
                lines.extend((kind, None) for kind, sink in self._run.sinks.items() if sink.by_checkpoint)
        for number in sorted(self._heads):
            if len(self._parts.get(number, ())) < self._heads[number].learners:
                break
            lines.extend(self._publish(self._heads.pop(number), self._parts.pop(number, [])))
        return lines, StatefulBatchLogic.RETAIN

    def _publish(self, head: PublisherHead, parts: list[SaidPart]) -> Iterable[tuple[str, Any]]:
        records = self._publisher.publish(head.rejects, [part.said for part in parts], head.end)
        kinds = _by_kind(records, self._publisher.keys)
        self._number = self._control.published = head.number
        self._control.note_published()
        if self._measures:
            self._measure(kinds.get(Prediction, ([], []))[0], head.status.pop("came", None))
        self._untold = head
        if head.end or self._status.due:
            self._tell()
        if head.number <= self._run.settings.quiet:
            return []
        sinks = self._run.sinks
        named = ((KIND_OF[kind], some, keys) for kind, (some, keys) in kinds.items())
        return [(kind, sinks[kind].encode(some, keys)) for kind, some, keys in named if kind in sinks]

    def _tell(self) -> None:
        if self._untold is not None:
            self._status.write(self._describe(self._untold))
            self._untold = None

    def notify_at(self) -> datetime | None:
        """Before a quiet spell people shall see the last batch too."""
        return None if self._untold is None else datetime.now(UTC) + timedelta(seconds=STATUS_S)

    def on_notify(self) -> tuple[list[tuple[str, Any]], bool]:
        self._tell()
        return [], StatefulBatchLogic.RETAIN

    def _measure(self, predictions: list[Any], came: float | None) -> None:
        """How long after their event time, and after the oldest record of the batch came, questions are answered."""
        now = wall.time()
        for prediction in predictions:
            self._latency.observe(now - prediction.time.timestamp())
        if came is not None and predictions:
            self._backlog.observe(now - came, len(predictions))

    def _describe(self, head: PublisherHead) -> dict[str, Any]:
        """What people see of the run."""
        return head.status | {
            "batch": head.number,
            "counts": dict(self._publisher.counts),
            "outcomes": self._publisher.evaluator.outcomes,
            "metrics": self._publisher.evaluator.values(),
            "versions": dict(islice(self._publisher.versions.items(), SHOWN_MODELS)),
            "models": len(self._publisher.versions),
            "latency": self._latency.state(),
            "backlog": self._backlog.state(),
        }

    def snapshot(self) -> int:
        """The last step of a checkpoint: all others, in all processes, have given their state by now.

        The engine closes an epoch step by step along the graph, and all of it leads here.
        """
        _assert_nothing_waits(self._heads, self._parts)
        if self._state is not None:
            self._state.write(self._number, self._publisher.changes(), complete=True)
            self._run.sync()
        self._control.workers = Phase.COMMITTING
        return self._number


def _assert_nothing_waits(heads: dict[int, Any], parts: dict[int, Any]) -> None:
    """A batch lies within one epoch, so at a snapshot nothing may be half done."""
    if heads or parts:
        raise RuntimeError(f"at a snapshot batches {sorted(set(heads) | set(parts))} were incomplete: a bug")


def _by_kind(records: list[Any], keys: list[Any]) -> dict[Any, tuple[list[Any], list[Any]]]:
    """The records, and their keys if they have any, by class."""
    kinds: dict[Any, tuple[list[Any], list[Any]]] = {}
    for place, record in enumerate(records):
        kind = type(record)
        if kind not in kinds:
            kinds[kind] = ([], [])
        some, its_keys = kinds[kind]
        some.append(record)
        if keys:
            its_keys.append(keys[place])
    return kinds


# -- outputs


class RecordsSink(FixedPartitionedSink[Any, Any]):
    """One engine partition per kind of record, behind it the declared sink.

    All are on the worker that publishes: records need not travel, and an output that is slow holds publishing back.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def list_parts(self) -> list[str]:
        mine = self._run.settings.worker == siphash13(PUBLISH) % self._run.settings.workers
        return list(KINDS) if mine else []

    def part_fn(self, item_key: str) -> int:
        return sorted(KINDS).index(item_key)  # the engine numbers partitions in the order of their names

    def build_part(self, step_id: str, for_part: str, resume_state: Any | None) -> WritePartition:
        start = self._run.start
        position = start.sinks.get(for_part) if resume_state is None and start is not None else resume_state
        sink = self._run.sinks.get(for_part)
        if sink is None:
            return WritePartition(None)
        output = Output(self._run.job.name, for_part, 1 if start is None else start.branch, self._run.directory.state)
        if start is None:
            output.begun.unlink(missing_ok=True)  # nothing outlives such a run
        if position is not None and not sink.accepts(position):
            position = None  # the launcher has said that it begins anew
        return WritePartition(sink.writer(output, position))


class WritePartition(StatefulSinkPartition[Any, Any]):
    """A sink's writer behind the engine's interface."""

    def __init__(self, writer: SinkWriter | None) -> None:
        self._writer = writer
        self._after_checkpoint = False

    def write_batch(self, values: list[Any]) -> None:
        if self._writer is None:
            return
        if self._after_checkpoint:
            # The first write of an epoch: the engine sends none before the checkpoint of the one before is complete.
            self._after_checkpoint = False
            self._writer.begin_epoch()
        for chunk in values:
            if chunk is not None:
                self._writer.write(chunk)
        self._writer.flush()

    def snapshot(self) -> Any:
        self._after_checkpoint = True
        return self._writer.position() if self._writer is not None else 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
