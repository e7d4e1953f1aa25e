"""Delayed progressive (prequential) metrics: each outcome is scored with the prediction made when it was asked.

The metrics of a job run over the outcomes of all its models, in the order in which labels became known. Those that
want labels rather than probabilities get the most probable label, as river's `evaluate.progressive_val_score` does.
"""

from __future__ import annotations

import heapq
import math
import pickle
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from river import metrics, utils

from dataflows.events import Metrics, ModelVersion, Outcome, Prediction, Record, Reject, reject, to_datetime
from dataflows.job import Job
from features.rows import Change, Rows, put

Said = tuple[int, Record, Any, int, Any]
"""What a learner says: (position in the batch, record, output as river gave it, moment in µs, key of the record). The
output and the moment matter for outcomes."""


def metric_name(metric: Any) -> str:
    """`ROCAUC`, or `ROCAUC_rolling_1000` for a rolling one.

    >>> from river import metrics
    >>> metric_name(utils.Rolling(metrics.MAE, window_size=10))
    'MAE_rolling_10'
    """
    if isinstance(metric, utils.Rolling):
        return f"{type(metric.obj).__name__}_rolling_{metric.window.maxlen}"
    return type(metric).__name__


def metric_names(job: Job) -> list[str]:
    """The names of a job's metrics, told apart by number where two are alike."""
    return _unique([metric_name(metric) for metric in job.metrics])


def most_probable(output: Any) -> Any:
    """The label of a distribution (None for an empty one); anything else is a label already."""
    if isinstance(output, dict):
        return max(output, key=output.get) if output else None  # type: ignore[arg-type]
    return output


class RocTally:
    """A `metrics.ROCAUC` that is updated in bulk: the same counts for a tenth of the cost.

    river counts each outcome at each of its thresholds. Here an outcome is tallied by its label and the number of
    thresholds it passes, and the tallies are handed to river's metric when it is read. Whole numbers add up
    exactly, so the value is river's to the last bit.

    >>> plain, tallied = metrics.ROCAUC(), RocTally(metrics.ROCAUC())
    >>> for label, p in [(True, 0.9), (False, 0.2), (True, 0.1), (False, 0.6)]:
    ...     plain.update(label, p)
    ...     tallied.update(label, p)
    >>> bool(tallied.get() == plain.get())
    True
    """

    requires_labels = False

    def __init__(self, metric: metrics.ROCAUC) -> None:
        self._metric = metric
        self._thresholds: list[float] = metric.thresholds
        self._tally: dict[tuple[bool, int], int] = {}

    def update(self, label: Any, output: Any) -> None:
        """Count one outcome."""
        p = output.get(True, 0.0) if isinstance(output, dict) else output
        key = (label == self._metric.pos_val, bisect_left(self._thresholds, p))
        self._tally[key] = self._tally.get(key, 0) + 1

    def get(self) -> float:
        """river's figure."""
        for (label, passed), count in self._tally.items():
            for place, matrix in enumerate(self._metric.cms):
                matrix.update(label, place < passed, float(count))
                matrix.n_samples += count - 1
        self._tally.clear()
        return self._metric.get()  # type: ignore[no-any-return]


class Evaluator:
    """Updates a job's metrics and says when they are due for a report.

    `add` takes an outcome's label, what the model said (as river gave it) and when the label became known (µs), and
    returns a Metrics record when a report is due, else None. `begun` counts, by name, how often a metric was begun.
    """

    def __init__(
        self, job: Job, state: dict[str, Any] | None = None, begun: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self._report = job.report
        self._names = metric_names(job)
        self._metrics: list[Any] = [
            RocTally(metric) if type(metric) is metrics.ROCAUC else metric
            for metric in pickle.loads(pickle.dumps(list(job.metrics)))
        ]
        self._keys = [(name, begun.get(name, 1)) for name in self._names]
        self.outcomes = 0
        self._period: int | None = None
        self._newest: int | None = None
        if state is not None:
            kept = state["metrics"]  # one that is new starts empty, one that is gone is dropped
            self._metrics = [kept.get(key, new) for key, new in zip(self._keys, self._metrics, strict=True)]
            self.outcomes, self._period, self._newest = state["outcomes"], state["period"], state["newest"]
        self._plan = [
            (name, metric, getattr(metric, "requires_labels", False))
            for name, metric in zip(self._names, self._metrics, strict=True)
        ]
        self.faults: list[str] = []
        """What metrics had against the outcomes added since somebody looked."""

    def state(self) -> dict[str, Any]:
        """All state, live: to be pickled at once."""
        return {
            "metrics": dict(zip(self._keys, self._metrics, strict=True)),
            "outcomes": self.outcomes,
            "period": self._period,
            "newest": self._newest,
        }

    def add(self, label: Any, output: Any, moment: int) -> Metrics | None:
        """Score one outcome; see the class."""
        report = None
        if self._report.period is not None:
            report = self._period_passed(moment)
        # No opinion is not scored, as in river: a classifier that has seen no label yet gives {}.
        if output is not None and output != {}:
            for name, metric, wants_label in self._plan:
                try:
                    metric.update(label, most_probable(output) if wants_label else output)
                except Exception as error:  # noqa: BLE001 - a figure that cannot be had must not stop the job
                    self.faults.append(f"{name}: {type(error).__name__}: {error}")
        self.outcomes += 1
        if self._newest is None or moment > self._newest:
            self._newest = moment
        if self._report.outcomes is not None and self.outcomes % self._report.outcomes == 0:
            report = self.now()
        return report

    def _period_passed(self, moment: int) -> Metrics | None:
        """A report of the period before, when an outcome is the first of a later one."""
        period = moment // self._report.period
        if self._period is None or period > self._period:
            before, self._period = self._period, period
            return None if before is None else self.now()
        return None

    def values(self) -> dict[str, float | None]:
        """The metrics by name; None where one is not defined yet."""
        return {name: _value(metric) for name, metric in zip(self._names, self._metrics, strict=True)}

    def now(self) -> Metrics | None:
        """A report as of now, None before the first outcome."""
        if self._newest is None:
            return None
        return Metrics(to_datetime(self._newest), self.outcomes, self.values())


def _value(metric: Any) -> float | None:
    try:
        number = float(metric.get())
    except Exception:  # noqa: BLE001 - as when it is updated
        return None
    return number if math.isfinite(number) else None


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


class Publisher:
    """The end of the road: what all learners said of a batch, in order, with the metrics that fall due.

    Counts what passes, for people to see. `versions` says by model how far it has come, as far as outcomes since the
    start tell; `keys` holds the keys of the records that were published last, if an output wants them.
    """

    def __init__(self, job: Job, rows: Rows | None = None, begun: Mapping[str, int] = MappingProxyType({})) -> None:
        self.counts: Counter[str] = Counter()
        self.versions: dict[str, int] = {}
        self.keys: list[Any] = []
        self._keyed = any(sink is not None and sink.keyed for _, sink in job.outputs.by_kind())
        self._reported = 0
        self._learned: dict[str, int] | None = None if job.outputs.models is None else {}
        evaluated = None
        kept = rows.get("publisher") if rows is not None else []
        if kept:
            evaluated, self.counts, self._reported, learned = kept[0]
            self._learned = None if self._learned is None else learned or {}
        self.evaluator = Evaluator(job, evaluated, begun)

    def changes(self) -> Iterator[Change]:
        """What the rows need to follow since the last call: the metrics and counts, which are small."""
        yield put("publisher", (self.evaluator.state(), self.counts, self._reported, self._learned))

    def publish(self, rejects: list[Reject], said: list[list[Said]], end: bool) -> list[Record]:
        """The records of one batch: rejects first, then predictions, outcomes and metrics as they came to be."""
        records: list[Record] = []
        keys = self.keys = []
        for refused in rejects:
            self._count_reject(refused)
            records.append(refused)
        predictions = outcomes = 0
        ordered: Iterable[Said] = said[0] if len(said) == 1 else heapq.merge(*said, key=itemgetter(0))
        for _, record, output, moment, key in ordered:
            if self._keyed:
                keys.extend([None] * (len(records) - len(keys)))
                keys.append(key)
            records.append(record)
            kind = type(record)
            if kind is Prediction:
                predictions += 1
            elif kind is Outcome:
                outcomes += 1
                records.extend(self._take_outcome(record, output, moment))
            else:
                self._count_reject(record)
        self.counts["predictions"] += predictions
        self.counts["outcomes"] += outcomes
        if end and self.evaluator.outcomes > self._reported:
            last = self.evaluator.now()
            if last is not None:
                records.extend(self._report(last))
        if self._keyed:
            keys.extend([None] * (len(records) - len(keys)))
        return records

    def _take_outcome(self, outcome: Any, output: Any, moment: int) -> Iterable[Record]:
        """Score an outcome; what the metrics have against it, and the report that falls due."""
        self.versions[outcome.model] = outcome.version_after
        if self._learned is not None:
            self._learned[outcome.model] = outcome.version_after
        report = self.evaluator.add(outcome.label, output, moment)
        if report is None and not self.evaluator.faults:
            return ()
        records: list[Record] = []
        while self.evaluator.faults:
            refused = reject("metric_error", self.evaluator.faults.pop(), f"event {outcome.id!r}", b"")
            self._count_reject(refused)
            records.append(refused)
        if report is not None:
            records.extend(self._report(report))
        return records

    def _count_reject(self, record: Any) -> None:
        self.counts["rejects"] += 1
        self.counts[f"rejects.{record.reason}"] += 1

    def _report(self, report: Metrics) -> Iterable[Record]:
        """A report, and how far the models have come that learned since the last one."""
        self.counts["reports"] += 1
        self._reported = report.outcomes
        yield report
        if self._learned is not None:
            yield from (ModelVersion(report.time, model, version) for model, version in self._learned.items())
            self._learned.clear()
