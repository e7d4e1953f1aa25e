"""The job of the state benchmark with state in the engine's own snapshots: one key per entity, a pickle of each.

    python -m tests.benchmarks.own_snapshots DATA DIRECTORY INTERVAL

What a Bytewax user would write: events keyed by entity into a `stateful_batch`, features by the same code, then one key
for the model, which keeps the questions that wait for their labels; predictions and outcomes to a file. It does less
than Millrace: no order of events between entities, no duplicates recognised, no rejects, no status.

DIRECTORY/control says how far it got, as that of a run does; DIRECTORY/recovery is the engine's.
"""

from __future__ import annotations

import gc
import pickle
import sys
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.run import cli_main

from dataflows.connectors.files import FileWriter
from dataflows.control import Control, Phase
from dataflows.events import Outcome, Prediction, encode_lines, to_datetime
from features.state import EntityFeatures
from tests.benchmarks.measure import WORKER_COLLECTOR
from tests.benchmarks.state_job import Ping, entity, job

BATCH = 1_000
Asked = tuple[Ping, tuple[Any, ...]]


class Lines(FixedPartitionedSource[tuple[str, Ping], int]):
    """The input file, as one partition."""

    def __init__(self, path: Path, control: Control) -> None:
        self._path = path
        self._control = control

    def list_parts(self) -> list[str]:
        return ["lines"]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> LinesPartition:
        return LinesPartition(self._path, resume_state or 0, self._control)


class LinesPartition(StatefulSourcePartition[tuple[str, Ping], int]):
    """Batches of decoded events by entity."""

    def __init__(self, path: Path, position: int, control: Control) -> None:
        self._file = path.open("rb")
        self._file.seek(position)
        self._control = control
        self._saved = False

    def next_batch(self) -> list[tuple[str, Ping]]:
        if self._saved:
            self._saved = False
            self._control.workers = Phase.RUNNING
        decode = Ping.decode
        batch = []
        for _ in range(BATCH):
            line = self._file.readline()
            if not line:
                break
            ping = decode(line)
            batch.append((str(ping.entity), ping))
        if not batch:
            raise StopIteration
        return batch

    def snapshot(self) -> int:
        self._saved = True
        self._control.workers = Phase.SNAPSHOT
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class EntityLogic(StatefulBatchLogic[Ping, Asked, bytes]):
    """The features of one entity."""

    # The declaration's plan is the same for all entities: they share the object that holds it, and them.
    shared = EntityFeatures(entity, trusted=job.trusted_columns)

    def __init__(self, resume_state: bytes | None) -> None:
        self._entity: int | None = None
        if resume_state is not None:
            self._entity, state = pickle.loads(resume_state)
            self.shared._young[self._entity] = state

    def on_batch(self, values: list[Ping]) -> tuple[list[Asked], bool]:
        ask = self.shared.ask
        self._entity = values[0].entity
        asked = [(ping, ask(ping.entity, ping.at, (ping.amount, ping.profile))) for ping in values]
        return asked, StatefulBatchLogic.RETAIN

    def snapshot(self) -> bytes:
        assert self._entity is not None
        return pickle.dumps((self._entity, self.shared._young[self._entity]), 5)


class ModelLogic(StatefulBatchLogic[Asked, bytes, bytes]):
    """The model, and the questions that wait for their labels."""

    def __init__(self, resume_state: bytes | None, control: Control) -> None:
        state = (
            (pickle.loads(pickle.dumps(job.model)), 0, 0, deque()) if not resume_state else pickle.loads(resume_state)
        )
        self._model: Any = state[0]
        self._version: int = state[1]
        self._count: int = state[2]
        self._open: deque[Any] = state[3]
        self._control = control

    def on_batch(self, values: list[Asked]) -> tuple[list[bytes], bool]:
        said: list[Any] = []
        names, model, waiting = job.feature_names, self._model, self._open
        for ping, features in values:
            while waiting and waiting[0][0] <= ping.at:
                said.append(self._learn(*waiting.popleft()))
            x = dict(zip(names, (ping.amount, *features), strict=True))
            output = model.predict_proba_one(x).get(True, 0.0)
            at = to_datetime(ping.at)
            said.append(Prediction(ping.number, at, x, output, job.model_name, self._version))
            waiting.append((ping.at + ping.wait, ping.number, at, x, output, ping.y, self._version))
        self._count += len(values)
        self._control.published = self._count // BATCH
        return [encode_lines(said)], StatefulBatchLogic.RETAIN

    def _learn(self, due: int, number: int, at: Any, x: Any, output: float, y: bool, version: int) -> Outcome:
        self._model.learn_one(x, y)
        self._version += 1
        return Outcome(number, at, output, y, to_datetime(due), job.model_name, version, self._version)

    def snapshot(self) -> bytes:
        return pickle.dumps((self._model, self._version, self._count, self._open), 5)


class Records(FixedPartitionedSink[bytes, int]):
    """One file of records, cut back to the snapshot on resume."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def list_parts(self) -> list[str]:
        return ["records"]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> RecordsPartition:
        return RecordsPartition(FileWriter(self._path, resume_state))


class RecordsPartition(StatefulSinkPartition[bytes, int]):
    """The file behind the engine's interface."""

    def __init__(self, writer: FileWriter) -> None:
        self._writer = writer

    def write_batch(self, values: list[bytes]) -> None:
        for chunk in values:
            self._writer.write(chunk)
        self._writer.flush()

    def snapshot(self) -> int:
        return self._writer.position()

    def close(self) -> None:
        self._writer.close()


def dataflow(data: Path, directory: Path) -> Dataflow:
    """The graph."""
    control = Control(directory / "control")
    flow = Dataflow("own_snapshots")
    pings = op.input("read", flow, Lines(data, control))
    asked = op.stateful_batch("features", pings, EntityLogic)
    gathered = op.flat_map_batch("gather", asked, _together)
    said = op.stateful_batch("learner", gathered, lambda state: ModelLogic(state, control))
    op.output("write", said, Records(directory / "records.jsonl"))
    return flow


def _together(items: list[tuple[str, Asked]]) -> Iterable[tuple[str, Asked]]:
    return [("model", asked) for _, asked in items]


def main(data: str, directory: str, interval: str) -> None:
    """Run to the end of input."""
    gc.set_threshold(*WORKER_COLLECTOR)
    path = Path(directory)
    recovery = path / "recovery"
    if not recovery.exists():
        recovery.mkdir(parents=True)
        init_db_dir(recovery, 1)
    cli_main(
        dataflow(Path(data), path),
        epoch_interval=timedelta(seconds=float(interval)),
        recovery_config=RecoveryConfig(recovery),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
