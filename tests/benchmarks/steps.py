"""Where the time of an event goes: processor time of each step of `job.play`, and of the engine around it.

    python -m tests.benchmarks.steps TRANSACTIONS

prints one JSON line of µs per event. Times are processor time of this process, so that a busy machine disturbs them
less; the garbage collector is set as in the workers of `millrace run`. Three runs over the same file, after a warm-up
on its first lines:

1. clean: `play`, encode, write; nothing is measured inside.
2. timed: the same with a clock around each step, batch by batch (so the clock costs nothing per event).
3. river alone: the model's calls of the run before, on the recorded features; predictions alone, then with learning.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec

from dataflows import replay
from dataflows.admit import Admit
from dataflows.evaluate import Publisher
from dataflows.events import Prediction, encode
from dataflows.job import Job
from dataflows.learner import Learner
from dataflows.order import Reader
from dataflows.replay import PlainRun, inputs_of
from dataflows.runtime import load_job, with_inputs
from tests.benchmarks.measure import WORKER_COLLECTOR

JOB = "examples/fraud/job.py"
WARM_UP = 5_000


class Clock:
    """Sums up processor time by step.

    >>> clock = Clock()
    >>> clock.around("sum", sum)([1, 2])
    3
    >>> list(clock.seconds)
    ['sum']
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def timed(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.process_time() - started

        return timed

    def around_features(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`answer_rows`, timed by entity: its first argument tells which."""

        def timed(features: Any, *arguments: Any) -> Any:
            started = time.process_time()
            try:
                return function(features, *arguments)
            finally:
                entity = features.names[0].rpartition("_by_")[2]
                self.seconds[f"features {entity}"] += time.process_time() - started

        return timed

    def collecting(self, phase: str, _: dict[str, int]) -> None:
        """For `gc.callbacks`: how much of all that is garbage collection."""
        self.seconds["gc"] += time.process_time() if phase == "stop" else -time.process_time()


class Patched:
    """Puts other functions in the place of attributes, for the time of a `with`."""

    def __init__(self, *patches: tuple[Any, str, Callable[..., Any]]) -> None:
        self._patches = patches
        self._before = [getattr(owner, name) for owner, name, _ in patches]

    def __enter__(self) -> None:
        for owner, name, function in self._patches:
            setattr(owner, name, function)

    def __exit__(self, *_: object) -> None:
        for (owner, name, _function), before in zip(self._patches, self._before, strict=True):
            setattr(owner, name, before)


def batches(job: Job) -> Iterator[list[Any]]:
    """The records of `job.play()`, a list for each batch."""
    run = PlainRun(job, Reader(inputs_of(job), job.time))
    while not run.reader.finished:
        batch = run.reader.next_batch()
        if batch is not None:
            yield list(run.process(run.admit.admit(batch)))


def encode_all(records: list[Any]) -> bytes:
    """The records of a batch as lines."""
    return b"".join([encode(record) for record in records])


def clean(job: Job, target: Path) -> tuple[float, int]:
    """Processor seconds of reading, playing, encoding and writing, and how many events there were."""
    events = 0
    started = time.process_time()
    with target.open("wb") as file:
        for records in batches(job):
            file.write(encode_all(records))
            events += sum(1 for record in records if type(record) is Prediction)
    return time.process_time() - started, events


def timed(job: Job, target: Path) -> dict[str, float]:
    """Seconds by step, with `total`, and `gc`, which is part of the others."""
    clock = Clock()
    to_bytes = clock.around("encode", encode_all)
    publish = clock.around("metrics", _eagerly(Publisher.publish))
    gc.callbacks.append(clock.collecting)
    with Patched(
        (Reader, "next_batch", clock.around("decode and order", Reader.next_batch)),
        (Admit, "admit", clock.around("admit", Admit.admit)),
        (replay, "answer_rows", clock.around_features(replay.answer_rows)),
        (Learner, "process", clock.around("learner", Learner.process)),
        (Publisher, "publish", publish),
    ):
        started = time.process_time()
        with target.open("wb") as file:
            for records in batches(job):
                file.write(to_bytes(records))
        clock.seconds["total"] = time.process_time() - started
    gc.callbacks.remove(clock.collecting)
    return dict(clock.seconds)


def river_alone(job: Job, written: Path) -> tuple[float, float]:
    """Seconds of the model's predictions and of its learning, on the features of written records, in their order."""
    calls = _calls(written)
    questions = [x for x, label in calls if label is None]
    gc.collect()
    gc.freeze()  # the recorded calls are the benchmark's; collecting through them is no cost of the model
    model = job.model.clone()
    started = time.process_time()
    for x, label in calls:
        if label is None:
            model.predict_proba_one(x)
        else:
            model.learn_one(x, label)
    both = time.process_time() - started
    started = time.process_time()
    for x in questions:
        model.predict_proba_one(x)
    predict = time.process_time() - started
    gc.unfreeze()
    return predict, both - predict


def _eagerly(generator: Callable[..., Any]) -> Callable[..., Any]:
    """A generator's work done when it is called, so that the clock sees all of it."""
    return lambda *arguments: list(generator(*arguments))


def _calls(written: Path) -> list[tuple[dict[str, Any], Any]]:
    """What the model was asked and taught: (features, None) or (features as they were asked, label)."""
    asked: dict[Any, dict[str, Any]] = {}
    calls: list[tuple[dict[str, Any], Any]] = []
    with written.open("rb") as lines:
        for record in map(msgspec.json.decode, lines):
            if record["record"] == "prediction":
                asked[record["id"]] = record["features"]
                calls.append((record["features"], None))
            elif record["record"] == "outcome":
                calls.append((asked.pop(record["id"]), record["label"]))
    return calls


def measure(source: Path) -> dict[str, float]:
    """µs per event by step."""
    gc.set_threshold(*WORKER_COLLECTOR)
    job = with_inputs(load_job(JOB), str(source), None)
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "records.jsonl"
        _warm_up(job, source, Path(name))
        clean_s, events = clean(job, target)
        seconds = timed(job, target)
        predict, learn = river_alone(job, target)
    pieces = _pieces(seconds, predict, learn)
    pieces["play, unmeasured"] = clean_s
    return {name: round(s / events * 1e6, 3) for name, s in pieces.items()} | {"events": events}


def _warm_up(job: Job, source: Path, directory: Path) -> None:
    """Run over a few events first: what is imported and compiled on first use is no cost of an event."""
    head = directory / "head.jsonl"
    with source.open("rb") as lines, head.open("wb") as file:
        file.writelines(line for line, _ in zip(lines, range(WARM_UP), strict=False))
    clean(with_inputs(job, str(head), None), directory / "warm.jsonl")


def _pieces(seconds: dict[str, float], predict: float, learn: float) -> dict[str, float]:
    """The steps in the order of the road; what no step accounts for is `gather and write`."""
    total, collected, learner = seconds.pop("total"), seconds.pop("gc", 0.0), seconds.pop("learner")
    metrics, encoded = seconds.pop("metrics"), seconds.pop("encode")
    rest = total - sum(seconds.values()) - learner - metrics - encoded
    return seconds | {
        "learner: predict (river)": predict,
        "learner: learn (river)": learn,
        "learner: ours": learner - predict - learn,
        "metrics": metrics,
        "encode": encoded,
        "gather and write": rest,
        "play": total,
        "of it garbage collection": collected,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
