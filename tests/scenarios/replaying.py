"""A run to be replayed, its command line, and the plain loop that says what a replay has to give."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dataflows.checkpoints import Checkpoints
from dataflows.events import Record, encode_lines
from dataflows.job import KIND_OF, KINDS, Job
from dataflows.order import Reader, ReadMode
from dataflows.orderlog import ALL_READY, LogEntry, OrderLog
from dataflows.replay import PlainRun, inputs_of
from dataflows.runtime import with_inputs
from dataflows.settings import RunDirectory
from tests.scenarios import running

IMPORTS = """
from river import linear_model, metrics, naive_bayes, preprocessing
from dataflows import Event, Job, Jsonl, Label, Outputs, Report, Time
from dataflows.job import Sink
from features import Count, Entity, Fields, Max, Mean


class Payment(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    card: str
    shop: str
    amount: float
    fraud: bool


class Verdict(Event, id="id", time="t", unit="s"):
    id: int
    t: int
    fraud: bool


CARD = Entity("card", [Count(), Mean("amount")], over="1d")
SHOP = Entity("shop", [Mean("fraud")], over="2d", of="labels")
"""

STREAM = f"""{IMPORTS}
job = Job(
    name="replayed",
    events=Jsonl("EVENTS", Payment),
    features=[Fields("amount"), CARD, SHOP],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(Jsonl("LABELS", Verdict), field="fraud", horizon="12h", otherwise=False),
    metrics=[metrics.ROCAUC()],
    report=Report(outcomes=40),
    outputs=Outputs(models=Sink()),
    time=Time(order="ORDER", lateness="1h", idle=3600.0),
)
"""

DELAYED = f"""{IMPORTS}
job = Job(
    name="delayed",
    events=Jsonl("EVENTS", Payment),
    features=[Fields("amount"), CARD, SHOP],
    model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    label=Label(field="fraud", delay="3d"),
    metrics=[metrics.ROCAUC()],
    time=Time(order="ORDER", idle=3600.0),
)
"""

HOW = ("--groups", "4", "--batch-size", "20", "--checkpoint", "0", "--keep-last", "1000", "--durability", "process")
STEP_S = 600
"""Between two events."""


def write_inputs(events: Path, labels: Path, count: int = 600, mixed: float = 4.0) -> None:
    """Payments each ten minutes and verdicts hours later, a little out of order, a few damaged or far too late."""
    rng = random.Random(11)
    rows: list[dict[str, Any]] = [
        {
            "id": i, "t": i * STEP_S, "card": f"c{i % 11}", "shop": f"s{i % 5}", "amount": i * 37 % 101,
            "fraud": i % 7 == 3,
        }
        for i in range(count)
    ]  # fmt: skip
    said = [
        {"id": r["id"], "t": r["t"] + rng.randrange(3600, 30_000), "fraud": r["fraud"]} for r in rows if r["id"] % 3
    ]
    for path, some in ((events, rows), (labels, sorted(said, key=lambda row: row["t"]))):
        places = sorted(range(len(some)), key=lambda i: i + rng.uniform(0, mixed))
        lines = [json.dumps(some[i]) for i in places]
        if mixed:
            lines.insert(count // 3, "{broken")
            lines.insert(count // 2, json.dumps(some[2] | {"id": -1}))
        path.write_text("".join(line + "\n" for line in lines))


class Original:
    """A job file with its inputs, and a run of it.

    Parameters
    ----------
    path
        A directory of its own.
    text
        The job file; EVENTS, LABELS and ORDER are filled in.
    order
        How the job orders events.
    """

    def __init__(self, path: Path, text: str = STREAM, order: str = "event_time") -> None:
        self.path = path
        self.text = text.replace("ORDER", order)
        self.file, self.out = path / "replayed_job.py", path / "out"
        self.events, self.labels = path / "events.jsonl", path / "labels.jsonl"
        self.file.write_text(self.filled(self.text))

    def filled(self, text: str) -> str:
        """A job file's text with the paths of the inputs."""
        return text.replace("EVENTS", str(self.events)).replace("LABELS", str(self.labels))

    def changed(self, name: str, *changes: tuple[str, str]) -> Path:
        """Another job file, with something in it replaced."""
        text = self.text
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = self.path / f"{name}.py"
        file.write_text(self.filled(text))
        return file

    @property
    def directory(self) -> RunDirectory:
        """Where its parts lie."""
        return RunDirectory(self.out)

    def run(self, *options: str) -> str:
        """`millrace run` to its end."""
        return running.run(str(self.file), self.out, *HOW, *options)

    def run_and_kill(self, after: int) -> None:
        """`millrace run`, killed -9 once it has some checkpoints, and again to its end."""
        process = running.start(str(self.file), self.out, *HOW)
        wait_until(lambda: len(Checkpoints(self.directory).all()) > after or process.poll() is not None, "checkpoints")
        process.kill()
        process.communicate()
        self.run()

    def outputs(self) -> dict[str, bytes]:
        """All records it wrote."""
        return outputs(self.out)

    def checkpoint(self, part: float) -> Any:
        """A checkpoint somewhere on the way."""
        kept = Checkpoints(self.directory).all()
        return kept[int(len(kept) * part)]

    def log(self) -> list[LogEntry]:
        """How the batches of the first branch were made."""
        return list(OrderLog(self.directory.order_log(1), writable=False).after(0))

    def replay(self, output: Path, *options: str, fails: bool = False, job: Path | None = None) -> str:
        """`millrace replay` of it to its end; what it said."""
        words = [str(job or self.file), "--directory", str(self.out), "--output", str(output), *options]
        return millrace("replay", *words, fails=fails)


def outputs(directory: Path) -> dict[str, bytes]:
    """The records by kind."""
    return {kind: file.read_bytes() for kind in KINDS if (file := directory / f"{kind}.jsonl").exists()}


def files(directory: Path) -> dict[Path, bytes]:
    """Every file, but what SQLite makes beside one to read it."""
    found = (
        file for file in sorted(directory.rglob("*")) if file.is_file() and not file.name.endswith(("-shm", "-wal"))
    )
    return {file: file.read_bytes() for file in found}


def begin(*words: str) -> subprocess.Popen[str]:
    """A command in the background."""
    command = [sys.executable, "-m", "dataflows", *words]
    return subprocess.Popen(
        command,
        env=running.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=running.ROOT,
    )


def millrace(*words: str, fails: bool | int = False) -> str:
    """A command to its end; what it said, on one line if it has to fail."""
    process = begin(*words)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == int(fails), printed
    return " ".join(printed.split()) if fails else printed


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Fails the test when it takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)


# -- what has to come out


class Entries:
    """An order log out of entries."""

    def __init__(self, entries: Iterable[LogEntry], regroup: bool = False) -> None:
        self._entries = [msgspec.structs.replace(e, count=ALL_READY) if regroup else e for e in entries]

    def after(self, number: int) -> Iterator[LogEntry]:
        """Those after a batch."""
        return iter([entry for entry in self._entries if entry.number > number])

    def close(self) -> None:
        """Nothing is open."""


def load(file: Path) -> Job:
    """The job of a file, whatever was loaded before."""
    spec = importlib.util.spec_from_file_location(f"oracle_{file.stem}_{time.monotonic_ns()}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    job: Job = module.job
    return job


def plain(
    file: Path, log: Sequence[LogEntry], regroup: bool = False, labels: Path | None = None, quiet: int = 0
) -> dict[str, bytes]:
    """What a plain loop of a job gives over batches formed as a log says, as the outputs would have it."""
    job = with_inputs(load(file), None, None if labels is None else str(labels))
    reader = Reader(inputs_of(job), job.time, mode=ReadMode(logged=True), log=Entries(log, regroup))  # type: ignore[arg-type]
    loop = PlainRun(job, reader)
    records: list[Record] = []
    while not reader.finished:
        batch = reader.next_batch()
        assert batch is not None
        said = list(loop.process(loop.admit.admit(batch)))
        records += said if batch.number > quiet else []
    reader.close()
    return by_kind(records, job)


def by_kind(records: Iterable[Record], job: Job) -> dict[str, bytes]:
    """Records as the outputs would have them."""
    found: dict[str, list[Record]] = {kind: [] for kind, sink in job.outputs.by_kind() if sink is not None}
    for record in records:
        if KIND_OF[type(record)] in found:
            found[KIND_OF[type(record)]].append(record)
    return {kind: encode_lines(some) for kind, some in found.items()}
