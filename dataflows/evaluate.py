"""Delayed progressive (prequential) metrics: each outcome is scored with the prediction made when it was asked.

The metrics of a job run over the outcomes of all its models, in the order in which labels became known. Those that
want labels rather than probabilities get the most probable label, as river's `evaluate.progressive_val_score` does.
"""

from __future__ import annotations

import heapq
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from river import utils

from dataflows.events import Metrics, Outcome, Prediction, Record, Reject, to_datetime
from dataflows.job import Job

Said = tuple[int, Record, Any, int]
"""What a learner says: (position in the batch, record, output as river gave it, moment in µs); the last two matter
for outcomes."""


def metric_name(metric: Any) -> str:
    """`ROCAUC`, or `ROCAUC_rolling_1000` for a rolling one.

    >>> from river import metrics
    >>> metric_name(utils.Rolling(metrics.MAE, window_size=10))
    'MAE_rolling_10'
    """
    if isinstance(metric, utils.Rolling):
        return f"{type(metric.obj).__name__}_rolling_{metric.window.maxlen}"
    return type(metric).__name__


def most_probable(output: Any) -> Any:
    """The label of a distribution (None for an empty one); anything else is a label already."""
    if isinstance(output, dict):
        return max(output, key=output.get) if output else None  # type: ignore[arg-type]
    return output


class Evaluator:
    """Updates a job's metrics and says when they are due for a report.

    `add` takes an outcome's label, what the model said (as river gave it) and when the label became known (µs), and
    returns a Metrics record when a report is due, else None.
    """

    def __init__(self, job: Job, state: bytes | None = None) -> None:
        self._report = job.report
        self._names = _unique([metric_name(m) for m in job.metrics])
        self._metrics: list[Any] = pickle.loads(pickle.dumps(list(job.metrics)))
        self.outcomes = 0
        self._period: int | None = None
        self._newest: int | None = None
        if state is not None:
            self._metrics, self.outcomes, self._period, self._newest = pickle.loads(state)
        self._plan = [(m, getattr(m, "requires_labels", False)) for m in self._metrics]

    def snapshot(self) -> bytes:
        """All state as bytes."""
        return pickle.dumps((self._metrics, self.outcomes, self._period, self._newest), 5)

    def add(self, label: Any, output: Any, moment: int) -> Metrics | None:
        """Score one outcome; see the class."""
        report = None
        if self._report.period is not None:
            report = self._period_passed(moment)
        # No opinion is not scored, as in river: a classifier that has seen no label yet gives {}.
        if output is not None and output != {}:
            for metric, wants_label in self._plan:
                metric.update(label, most_probable(output) if wants_label else output)
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
        return {name: _finite(metric.get()) for name, metric in zip(self._names, self._metrics, strict=True)}

    def now(self) -> Metrics | None:
        """A report as of now, None before the first outcome."""
        if self._newest is None:
            return None
        return Metrics(to_datetime(self._newest), self.outcomes, self.values())


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


class Publisher:
    """The end of the road: what all learners said of a batch, in order, with the metrics that fall due.

    Counts what passes, for people to see.
    """

    def __init__(self, job: Job, state: bytes | None = None) -> None:
        self.counts: Counter[str] = Counter()
        evaluator_state = None
        if state is not None:
            evaluator_state, self.counts, self._reported = pickle.loads(state)
        else:
            self._reported = 0
        self.evaluator = Evaluator(job, evaluator_state)

    def snapshot(self) -> bytes:
        """All state as bytes."""
        return pickle.dumps((self.evaluator.snapshot(), self.counts, self._reported), 5)

    def publish(self, rejects: list[Reject], said: list[list[Said]], end: bool) -> Iterator[Record]:
        """The records of one batch: rejects first, then predictions, outcomes and metrics as they came to be."""
        for refused in rejects:
            yield self._count_reject(refused)
        for _, record, output, moment in said[0] if len(said) == 1 else heapq.merge(*said, key=itemgetter(0)):
            if type(record) is Prediction:
                self.counts["predictions"] += 1
                yield record
            elif type(record) is Outcome:
                self.counts["outcomes"] += 1
                yield record
                report = self.evaluator.add(record.label, output, moment)
                if report is not None:
                    yield self._count_report(report)
            else:
                yield self._count_reject(record)
        if end and self.evaluator.outcomes > self._reported:
            last = self.evaluator.now()
            if last is not None:
                yield self._count_report(last)

    def _count_reject(self, record: Any) -> Record:
        self.counts["rejects"] += 1
        self.counts[f"rejects.{record.reason}"] += 1
        return record  # type: ignore[no-any-return]

    def _count_report(self, report: Metrics) -> Record:
        self.counts["reports"] += 1
        self._reported = report.outcomes
        return report
