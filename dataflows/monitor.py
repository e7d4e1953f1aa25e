"""A run's measures for Prometheus, over HTTP: `millrace run JOB --metrics-port 9100`.

Served by the launcher. The workers know nothing of it: each scrape reads what the run leaves behind anyway, which is
`state/status.json` (what the publisher says a few times a second), the manifests of checkpoints, and the memory that
the processes share. What is not there, or cannot be read just now, is left out of the answer.

Counters count the records of the job, not the work of a process: they go on from the checkpoint after a restart, and
what is done again because a worker was killed is not counted again. So they stand still until the run is past the point
it had reached, and never go back (Prometheus would take that for a start from 0, and add all of it).
"""

from __future__ import annotations

import time as wall
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dataflows.checkpoints import Checkpoints
from dataflows.control import Control, Phase
from dataflows.settings import RunDirectory
from dataflows.startup import RunError
from dataflows.state import StateError

MOST_MODELS = 100
"""Models that are shown one by one; a job with a model per key may have very many."""
MOST_PARTITIONS = 1000
"""Partitions that are shown one by one."""

_LARGEST = 1e300  # what is not below it (NaN, infinity, an integer no float can hold) is no measure


# -- the measures


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric as Prometheus sees it. Each has the label `job` too; a counter's samples end in `_total`."""

    name: str
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily] | type[HistogramMetricFamily]
    help: str
    labels: tuple[str, ...] = ()

    def family(self) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
        """The metric without samples."""
        return self.kind(self.name, self.help, labels=("job", *self.labels))


READ = Measure(
    "millrace_records_read",
    CounterMetricFamily,
    "Records taken from the inputs: events, labels, and those that could not be used.",
)
EVENTS = Measure("millrace_events", CounterMetricFamily, "Events that were let in, each once: questions to the model.")
PREDICTIONS = Measure("millrace_predictions", CounterMetricFamily, "Predictions made: answers of the model to events.")
OUTCOMES = Measure(
    "millrace_outcomes",
    CounterMetricFamily,
    "Predictions whose label is known by now (or was assumed): scored, then learned from.",
)
REJECTS = Measure(
    "millrace_rejects",
    CounterMetricFamily,
    "Records that could not be used, by reason; each is kept in the output for rejects.",
    ("reason",),
)
LATE = Measure(
    "millrace_late_events",
    CounterMetricFamily,
    "Events behind the watermark, but within the allowed lateness: answered, and marked late.",
)
TOMBSTONES = Measure(
    "millrace_tombstones",
    CounterMetricFamily,
    "Records without a value, which Kafka keeps as marks of deletion; skipped.",
)
GAP = Measure(
    "millrace_gap_records",
    CounterMetricFamily,
    "Records that were gone when they were to be read: the input's retention had removed them. They are lost.",
)
LAG = Measure(
    "millrace_lag_records",
    GaugeMetricFamily,
    "Consumer lag: records that are in a partition of the input and were not read yet.",
    ("partition",),
)
POSITION = Measure(
    "millrace_partition_position", GaugeMetricFamily, "Where the next record of a partition is read.", ("partition",)
)
LATENCY = Measure(
    "millrace_prediction_latency_seconds",
    HistogramMetricFamily,
    "How old an event was when its prediction was made: that time less the event's own. Since the workers' last start.",
)
BACKLOG = Measure(
    "millrace_prediction_backlog_seconds",
    HistogramMetricFamily,
    "How long an event had been in the input, at the most, when its prediction was made: that time less the input's "
    "timestamp of the oldest record in its batch. Since the workers' last start.",
)
WATERMARK_LAG = Measure(
    "millrace_watermark_lag_seconds",
    GaugeMetricFamily,
    "How far event time is behind: now less the watermark, up to which all events are taken to have come.",
)
CLOCK = Measure(
    "millrace_clock_timestamp_seconds", GaugeMetricFamily, "Event time: the time of the newest event, in Unix seconds."
)
OPEN = Measure(
    "millrace_open_questions", GaugeMetricFamily, "Predictions that wait for their label; each is kept in memory."
)
BATCH = Measure("millrace_newest_batch", GaugeMetricFamily, "Number of the newest batch of which all records are out.")
SAID = Measure(
    "millrace_status_timestamp_seconds",
    GaugeMetricFamily,
    "When the run last told of itself, in Unix seconds; all measures of records are as of then.",
)
METRIC = Measure(
    "millrace_model_metric",
    GaugeMetricFamily,
    "How good the predictions are, by the metrics that the job declares; each was made before its label was known.",
    ("metric",),
)
VERSION = Measure(
    "millrace_model_version", GaugeMetricFamily, "Examples that a model has learned: its version.", ("model",)
)
LEFT_OUT = Measure(
    "millrace_left_out",
    GaugeMetricFamily,
    f"Models (above {MOST_MODELS}) and partitions (above {MOST_PARTITIONS}) that are too many to be shown one by one.",
    ("of",),
)
CHECKPOINT_AT = Measure(
    "millrace_checkpoint_timestamp_seconds",
    GaugeMetricFamily,
    "When the last checkpoint was complete, in Unix seconds; a killed run goes on from there.",
)
CHECKPOINT_AGE = Measure(
    "millrace_checkpoint_age_seconds",
    GaugeMetricFamily,
    "Seconds since the last checkpoint: what a kill now would undo.",
)
CHECKPOINT_BYTES = Measure(
    "millrace_checkpoint_bytes", GaugeMetricFamily, "Bytes of state that the last checkpoint wrote: what had changed."
)
CHECKPOINT_STALL = Measure(
    "millrace_checkpoint_stall_seconds", GaugeMetricFamily, "Seconds for which the last checkpoint let no event pass."
)
CHECKPOINT_BATCH = Measure("millrace_checkpoint_batch", GaugeMetricFamily, "Number of the last batch in a checkpoint.")
RETAINED = Measure(
    "millrace_checkpoints_retained", GaugeMetricFamily, "Checkpoints and savepoints that are kept and can be opened."
)
PHASE = Measure(
    "millrace_phase",
    GaugeMetricFamily,
    "What the processes are at: 1 for the phase that the workers, or the launcher, are in, 0 for the others.",
    ("process", "phase"),
)

MEASURES = (
    READ, EVENTS, PREDICTIONS, OUTCOMES, REJECTS, LATE, TOMBSTONES, GAP, LAG, POSITION, LATENCY, BACKLOG,
    WATERMARK_LAG, CLOCK, OPEN, BATCH, SAID, METRIC, VERSION, LEFT_OUT,
    CHECKPOINT_AT, CHECKPOINT_AGE, CHECKPOINT_BYTES, CHECKPOINT_STALL, CHECKPOINT_BATCH, RETAINED, PHASE,
)  # fmt: skip

Sample = tuple[Measure, tuple[str, ...], Any]
"""A measure, the values of its own labels, and its value (of a histogram: what `Tally.state` gives)."""


# -- what the run leaves behind, as samples

_PLAIN = (
    (READ, "read"), (EVENTS, "questions"), (LATE, "late_events"), (TOMBSTONES, "tombstones"), (GAP, "gap"),
    (OPEN, "open"), (BATCH, "batch"),
)  # fmt: skip
_COUNTED = ((PREDICTIONS, "predictions"), (OUTCOMES, "outcomes"))


def status_samples(status: Mapping[str, Any], now: float) -> Iterator[Sample]:
    """The samples of a status; of what it lacks, or has in another form, there are none."""
    for measure, name in _PLAIN:
        yield from _sample(measure, status.get(name))
    counts = _mapping(status, "counts")
    for measure, name in _COUNTED:
        yield from _sample(measure, counts.get(name))
    for name, value in counts.items():
        if name.startswith("rejects."):
            yield from _sample(REJECTS, value, name.removeprefix("rejects."))
    for name, value in _mapping(status, "metrics").items():
        yield from _sample(METRIC, value, name)
    yield from _time_samples(status, now)
    yield from _partition_samples(status)
    yield from _version_samples(_mapping(status, "versions"), status.get("models"))


def _time_samples(status: Mapping[str, Any], now: float) -> Iterator[Sample]:
    for clock in _numbers([status.get("clock")]):
        yield CLOCK, (), clock / 1e6
    for watermark in _numbers([status.get("watermark")]):
        yield WATERMARK_LAG, (), now - watermark / 1e6
    for measure, name in ((LATENCY, "latency"), (BACKLOG, "backlog")):
        tally = _mapping(status, name)
        if _is_tally(tally):
            yield measure, (), tally


def _partition_samples(status: Mapping[str, Any]) -> Iterator[Sample]:
    names: set[str] = set()
    for measure, key in ((LAG, "lag"), (POSITION, "position")):
        values = _mapping(status, key)
        names.update(values)
        for name in sorted(values)[:MOST_PARTITIONS]:
            yield from _sample(measure, values[name], name)
    if names:
        yield LEFT_OUT, ("partitions",), max(0, len(names) - MOST_PARTITIONS)


def _version_samples(versions: Mapping[str, Any], models: Any) -> Iterator[Sample]:
    """Those that have learned most; they stay the same for long, so few series come and go.

    `models` is how many there are, if the status has not all of them.
    """
    known = [name for name, value in versions.items() if _is_number(value)]
    known.sort(key=lambda name: (-versions[name], name))
    for name in known[:MOST_MODELS]:
        yield VERSION, (name,), versions[name]
    if known:
        there = max(_numbers([len(known), models]))
        yield LEFT_OUT, ("models",), max(0, there - MOST_MODELS)


def checkpoint_samples(run: RunDirectory, now: float) -> Iterator[Sample]:
    """The samples of the newest checkpoint, and how many there are; none where a manifest cannot be read."""
    checkpoints = Checkpoints(run)
    try:
        newest, retained = checkpoints.newest(), len(checkpoints.all())
        written = datetime.fromisoformat(newest.written_at).timestamp() if newest is not None else 0.0
    except (StateError, OSError, ValueError):
        return
    yield RETAINED, (), retained
    if newest is not None:
        yield CHECKPOINT_BATCH, (), newest.batch
        yield CHECKPOINT_BYTES, (), newest.bytes
        yield CHECKPOINT_AT, (), written
        yield CHECKPOINT_AGE, (), max(0.0, now - written)


def control_samples(run: RunDirectory) -> Iterator[Sample]:
    """What the processes are at; none before they share anything."""
    if not run.control.exists():  # opening it would make it
        return
    control = Control(run.control)
    yield CHECKPOINT_STALL, (), control.stall
    for process, at in (("workers", control.workers), ("launcher", control.launcher)):
        for phase in Phase:
            yield PHASE, (process, phase.name.lower()), int(phase is at)


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in values if _is_number(value)]


def _sample(measure: Measure, value: Any, *labels: str) -> Iterator[Sample]:
    if _is_number(value):
        yield measure, labels, value


def _is_tally(value: Mapping[str, Any]) -> bool:
    buckets, counts = value.get("buckets"), value.get("counts")
    if not isinstance(buckets, list) or not isinstance(counts, list) or len(counts) != len(buckets) + 1:
        return False
    return len(_numbers([*buckets, *counts, value.get("sum")])) == len(buckets) + len(counts) + 1


# -- the answer to a scrape


class RunCollector(Collector):
    """Gives the measures of a run to Prometheus, read anew at each scrape.

    Parameters
    ----------
    run
        Where the run lies.
    job
        The job's name.
    afresh
        The run does not go on where the one before ended (`--fresh`, `--from`): what that one said of itself is not
        shown, nor do counters go on from it.
    """

    def __init__(self, run: RunDirectory, job: str, afresh: bool = False) -> None:
        self._run = run
        self._job = job
        self._since = wall.time() if afresh else 0.0
        self._highest: dict[tuple[Measure, tuple[str, ...]], float] = {}
        for _ in self._samples():  # counters go on from here, though nobody has asked yet
            pass

    def describe(self) -> Iterable[Metric]:
        """All measures there can be, without samples."""
        return [measure.family() for measure in MEASURES]

    def collect(self) -> Iterator[Metric]:
        """All measures that there is something to say of."""
        found: dict[Measure, list[tuple[tuple[str, ...], Any]]] = {}
        for measure, labels, value in self._samples():
            found.setdefault(measure, []).append((labels, value))
        for measure in MEASURES:
            if measure in found:
                yield self._filled(measure, found[measure])

    def _samples(self) -> Iterator[Sample]:
        now = wall.time()
        for measure, labels, value in self._found(now):
            yield measure, labels, self._risen(measure, labels, value)

    def _found(self, now: float) -> Iterator[Sample]:
        status, written = self._status()
        if status:
            yield SAID, (), written
            yield from status_samples(status, now)
        yield from checkpoint_samples(self._run, now)
        yield from control_samples(self._run)

    def _status(self) -> tuple[Mapping[str, Any], float]:
        """What the run last said of itself, and when; empty where that cannot be read or is of a run before."""
        try:
            with self._run.status.open("rb") as file:
                written = self._run.status.stat().st_mtime
                status = msgspec.json.decode(file.read())
        except (OSError, ValueError):
            return {}, 0.0
        return (status, written) if isinstance(status, dict) and written >= self._since else ({}, 0.0)

    def _risen(self, measure: Measure, labels: tuple[str, ...], value: Any) -> Any:
        """Counters never go back: after a restart the run does again what was not in the checkpoint."""
        if measure.kind is not CounterMetricFamily:
            return value
        key = (measure, labels)
        self._highest[key] = highest = max(value, self._highest.get(key, 0.0))
        return highest

    def _filled(self, measure: Measure, samples: list[tuple[tuple[str, ...], Any]]) -> Metric:
        family = measure.family()
        for labels, value in samples:
            named = (self._job, *labels)
            if isinstance(family, HistogramMetricFamily):
                family.add_metric(named, _cumulative(value), sum_value=value["sum"])
            else:
                family.add_metric(named, value)
        return family


def _cumulative(tally: Mapping[str, Any]) -> list[tuple[str, float]]:
    """A tally's buckets as Prometheus wants them: each holds all that is below its bound.

    >>> _cumulative({"buckets": [0.5, 1.0], "counts": [2, 0, 1]})
    [('0.5', 2), ('1.0', 2), ('+Inf', 3)]
    """
    bounds = [*map(floatToGoString, tally["buckets"]), "+Inf"]
    total, pairs = 0, []
    for bound, count in zip(bounds, tally["counts"], strict=True):
        total += count
        pairs.append((bound, total))
    return pairs


class Monitor:
    """Answers Prometheus while a run is on: `with Monitor(run, "payments", "127.0.0.1", 9100): ...`

    Parameters
    ----------
    run, job, afresh
        As for `RunCollector`.
    host
        The address to listen on. Whoever reaches it can read the measures.
    port
        The port; it is taken when the block begins, so that one which is in use is found before anything starts.
    """

    def __init__(self, run: RunDirectory, job: str, host: str, port: int, afresh: bool = False) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(RunCollector(run, job, afresh))
        self._host = host
        self._port = port

    def __enter__(self) -> Monitor:
        try:
            self._server, self._thread = start_http_server(self._port, self._host, self._registry)
        except OSError as error:
            raise RunError(
                f"--metrics-port {self._port}: cannot listen on {self._host}: {error.strerror or error}. "
                "Hint: another port, or stop what uses this one; --metrics-host has to be an address of this machine"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
