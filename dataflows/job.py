"""Declaring a job: events, features, a model, where labels come from, what to measure and where results go.

Declarations are frozen and validate themselves; nothing runs here. See `Job` for an example.
"""

from __future__ import annotations

import inspect
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from river import base, metrics, utils

from dataflows.events import (
    Event,
    Metrics,
    ModelVersion,
    Outcome,
    Prediction,
    Record,
    Reject,
    describe_faults,
    encode_lines,
    plain_types,
)
from dataflows.order import Source, Time
from features.lookup import Lookup
from features.spec import Derived, Entity, Fields, duration

if TYPE_CHECKING:
    from dataflows.query import PastState


class JobError(Exception):
    """A declaration that cannot run: what is wrong, the value, and a hint.

    No ValueError, because pydantic would wrap it in a ValidationError and hide the hint among other lines.
    """


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Turns pydantic's list of faults into one message."""
    try:
        yield
    except ValidationError as error:
        raise JobError(f"{what}: {describe_faults(error)}") from None


class _Discard:
    """The type of `DISCARD`; one object, also after a pickle round trip."""

    def __repr__(self) -> str:
        return "DISCARD"

    def __reduce__(self) -> str:
        return "DISCARD"


DISCARD = _Discard()
"""`Label(otherwise=DISCARD)`: a question that expires without a label is forgotten, nothing is learned."""


class Output(NamedTuple):
    """Which output of which run a writer is for: the job's name, kind of records, branch, and state directory."""

    job: str
    kind: str
    branch: int
    state: Path

    @property
    def begun(self) -> Path:
        """Where an output that cannot be cut back keeps how it began."""
        return self.state / "outputs" / f"{self.kind}-{self.branch}.json"


class SinkWriter(ABC):
    """Writes one output; `position` is what a checkpoint keeps and `Sink.writer` takes on resume."""

    @abstractmethod
    def write(self, chunk: Any) -> None:
        """Take what `Sink.encode` gave."""

    @abstractmethod
    def flush(self) -> None:
        """Make what was written visible to readers, or see to it that it will be."""

    @abstractmethod
    def position(self) -> Any:
        """Make what was written durable; the place where the next write goes, as plain values."""

    def begin_epoch(self) -> None:  # noqa: B027 - only those that publish by the checkpoint have something to do
        """The checkpoint of the last `position` is complete: what was written before it can be published."""

    @abstractmethod
    def close(self) -> None:
        """Flush and give the output up."""


class SinkError(RuntimeError):
    """An output that cannot be written."""


class Sink(BaseModel):
    """Declares an output. Subclasses live in `dataflows.connectors`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def keyed(self) -> bool:
        """Whether it wants the key of each record (`Job.record_key`)."""
        return False

    @property
    def by_checkpoint(self) -> bool:
        """Whether it publishes what was written once the checkpoint after it is complete, and not before."""
        return False

    def writer(self, output: Output, position: Any | None) -> SinkWriter:
        """Open at a position, dropping what lies after it; None: from the beginning."""
        raise NotImplementedError

    def accepts(self, position: Any) -> bool:
        """Whether a position in a checkpoint is one of this kind of output."""
        return isinstance(position, int)

    def settle(self, output: Output, position: Any | None) -> None:
        """Publish what the checkpoint of `position` holds and was not published yet; called while no run is on.

        Raises `SinkError` or `InputError`. Only outputs that publish by the checkpoint have something to do.
        """

    def encode(self, records: list[Record], keys: list[Any]) -> Any:
        """Some records as its writer takes them; `keys` is empty where it wants none."""
        return encode_lines(records)

    def where(self) -> str:
        """Where records go, for people."""
        return type(self).__name__.lower()

    def rejects(self, job: str) -> Iterator[tuple[int, Reject]]:
        """The rejects of a job that were written here, up to what is there now, each with a number that is greater for
        those that were written later.

        Raises `JobError` where nothing can be read back, `InputError` where the output cannot be reached.
        """
        raise JobError(
            f"rejects that go to {self.where()} cannot be read back. Hint: Outputs(rejects=...) with a file or a topic"
        )

    def keep_aside(self, target: Path) -> None:
        """Keep what was written so far as `target`, before a new branch overwrites a part of it.

        Only sinks that overwrite have something to do.
        """

    def put_back(self, source: Path) -> None:
        """Begin with what was kept aside as `source`."""

    def size(self) -> int | None:
        """The position at the end of what is there; None where nobody can tell."""
        return None


class Outputs(BaseModel):
    """Where records go. What is not named goes to `directory/KIND.jsonl`; None switches a kind off.

    Parameters
    ----------
    directory
        Of files; default `runs/NAME` of the job.
    predictions, outcomes, metrics, rejects
        The kinds of records.
    models
        How far each model has come, reported with the metrics; off by default.
    key
        Field or fields of the event by which outputs that know keys (Kafka) keep predictions and outcomes in order.
        Default: what the job has one model per; else the key of its first Entity; else the event's id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path | None = None
    predictions: Sink | None = Field(default=Sink())
    outcomes: Sink | None = Field(default=Sink())
    metrics: Sink | None = Field(default=Sink())
    models: Sink | None = None
    rejects: Sink | None = Field(default=Sink())
    key: tuple[str, ...] | None = None

    def __init__(self, **named: Any) -> None:
        if isinstance(named.get("key"), str):
            named["key"] = (named["key"],)
        with faults_of("Outputs"):
            super().__init__(**named)

    def by_kind(self) -> list[tuple[str, Sink | None]]:
        """Each kind of records with its declaration; None where it is switched off."""
        return [(kind, getattr(self, kind)) for kind in KINDS]


KINDS = ("predictions", "outcomes", "metrics", "models", "rejects")

KIND_OF: dict[type, str] = {
    Prediction: "predictions",
    Outcome: "outcomes",
    Metrics: "metrics",
    ModelVersion: "models",
    Reject: "rejects",
}
"""The kind of each class of records."""


class Label(BaseModel):
    """Where the true label comes from, and how long a question waits for it.

    Three kinds:

    - a stream of its own: `Label(Jsonl("chargebacks.jsonl", Chargeback), field="fraud", horizon="7d")`, matched
      by id, or with `on=("station",), at="moment"` by entity and the question's event time;
    - a field of the same event, revealed later: `Label(field="fraud", delay="7d")`; the delay is a duration, the
      name of a field that holds one, or a function of the event that gives one;
    - a later event of the same entity: `Label(field="bikes", after="30m", by="station")`, the value of the field
      in the first event at least that much later.

    Parameters
    ----------
    source
        The stream of labels, if they have one.
    field
        The field that holds the label. None in it means "no label".
    horizon
        How long after its event time a question waits; a label at exactly the horizon is still in time.
        None: until it is answered (or pushed out by `max_open`).
    otherwise
        The label assumed when a question expires, or `DISCARD` (the default).
    revisions
        `first`: the first label is learned at once, later ones are rejects. `last`: the last label that came
        within the horizon is learned, once, when the horizon ends.
    max_open
        Questions that may wait at once; beyond, the oldest expires early and is counted.
    early
        How long a label that came before its question waits for it, in event time.
    max_early
        How many such labels may wait; beyond, the oldest is rejected as an orphan.

    >>> Label(field="fraud", delay="7d").delay
    604800000000
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    source: Source | None = None
    field: str
    delay: Any = None
    after: Any = None
    by: tuple[str, ...] | None = None
    on: tuple[str, ...] | None = None
    at: str | None = None
    horizon: Any = None
    otherwise: Any = DISCARD
    revisions: Literal["first", "last"] = "first"
    max_open: int = Field(default=1_000_000, gt=0)
    early: Any = "1d"
    max_early: int = Field(default=100_000, ge=0)

    def __init__(self, source: Source | None = None, /, **named: Any) -> None:
        for name in ("by", "on"):
            if isinstance(named.get(name), str):
                named[name] = (named[name],)
        with faults_of("Label"):
            super().__init__(source=source, **named)

    @property
    def kind(self) -> Literal["stream", "field", "later"]:
        """Which of the three kinds this is."""
        if self.source is not None:
            return "stream"
        return "later" if self.after is not None else "field"

    def model_post_init(self, _: Any) -> None:
        self._check_kind()
        for name in ("after", "horizon", "early"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, duration(getattr(self, name)))
        if isinstance(self.delay, str):
            object.__setattr__(self, "delay", _duration_or_name(self.delay))
        elif self.delay is not None and not callable(self.delay):
            object.__setattr__(self, "delay", duration(self.delay))
        if self.horizon is None and (self.otherwise is not DISCARD or self.revisions == "last"):
            raise JobError("Label: otherwise= and revisions='last' act when the horizon ends. Hint: give horizon=")

    def _check_kind(self) -> None:
        if self.source is not None and (self.delay is not None or self.after is not None):
            raise JobError("Label: a stream of labels has its own times. Hint: leave delay= and after= out")
        if self.source is None and self.delay is None and self.after is None:
            raise JobError(
                "Label: says not when the label is known. Hint: give a source, delay='7d' (a field of the event, "
                "revealed later), or after='30m', by='station' (a later event)"
            )
        if self.delay is not None and self.after is not None:
            raise JobError("Label: delay= and after= exclude each other")
        if (self.after is None) != (self.by is None):
            raise JobError("Label: after= and by= belong together: the label is in a later event of which entity?")
        if (self.on is None) != (self.at is None):
            raise JobError("Label: on= and at= belong together: match labels by which entity, and which time?")


def _duration_or_name(text: str) -> int | str:
    try:
        return duration(text)
    except ValueError:
        return text


class Report(BaseModel):
    """How often metrics are reported: every so many outcomes, or every period of event time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcomes: int | None = Field(default=None, gt=0)
    period: Any = None

    def model_post_init(self, _: Any) -> None:
        if (self.outcomes is None) == (self.period is None):
            raise JobError("Report: give either outcomes=1000 or period='1d'")
        if self.period is not None:
            object.__setattr__(self, "period", duration(self.period))


class Audit(BaseModel):
    """How predictions are kept so that each can be made again: see `millrace audit`.

    Parameters
    ----------
    every
        Examples between two keyframes of a model: to make a prediction again, no more have to be learned again. A
        keyframe is the pickled model: kilobytes for a logistic regression, megabytes for a forest.
    frames
        So many of the newest keyframes of each model stay; of older ones each tenth.
    keep
        How long, in event time, what was asked and learned is kept; None: for ever.

    >>> Audit(keep="400d").keep
    34560000000000
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=2_000, gt=0)
    frames: int = Field(default=100, gt=0)
    keep: Any = None

    def model_post_init(self, _: Any) -> None:
        if self.keep is not None:
            object.__setattr__(self, "keep", duration(self.keep))


Feature = Entity | Derived | Lookup | Fields

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Job(BaseModel):
    """One online learning job.

    Parameters
    ----------
    name
        Letters, digits, `-` and `_`; names the job's directory.
    events
        The source of events; each becomes a question, answered with a prediction.
    features
        `Fields`, `Derived`, `Lookup` and `Entity` declarations, in the order the model sees them.
    model
        Any river classifier, regressor or anomaly detector, or a pipeline ending in one. Copied when the job
        starts; randomness must be seeded.
    label
        Where the truth comes from.
    metrics
        river metrics, or `utils.Rolling(metrics.ROCAUC, window_size=1000)`.
    per
        Field or fields of the event: one model for each value instead of a global one.
    report
        How often metrics are reported (default: every 1,000 outcomes).
    time
        Order and lateness.
    outputs
        Where records go.
    warm_start
        A bundle (`millrace models JOB export`) with the models to begin with, of another job or of this one.
    audit
        How predictions are kept to be made again; None: not at all.
    max_ids
        Event ids remembered to recognise duplicates; the oldest are forgotten beyond.
    max_models
        Models that may exist at once with `per`; questions for more are rejected.

    >>> from river import linear_model, metrics, preprocessing
    >>> from features import Count, Fields, Mean
    >>> class Payment(Event, id="payment_id", time="paid_at", unit="s"):
    ...     payment_id: int
    ...     paid_at: float
    ...     card_id: str
    ...     amount: float
    ...     fraud: bool
    >>> from dataflows.connectors import Jsonl
    >>> job = Job(
    ...     name="fraud",
    ...     events=Jsonl("payments.jsonl", Payment),
    ...     features=[Fields("amount"), Entity("card_id", [Count(), Mean("amount")], over="1d")],
    ...     model=preprocessing.StandardScaler() | linear_model.LogisticRegression(),
    ...     label=Label(field="fraud", delay="7d"),
    ...     metrics=[metrics.ROCAUC()],
    ... )
    >>> job.feature_names
    ('amount', 'count_1d_by_card_id', 'amount_mean_1d_by_card_id')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    events: Source
    features: tuple[Feature, ...]
    model: Any
    label: Label
    metrics: tuple[Any, ...] = ()
    per: tuple[str, ...] | None = None
    report: Report = Field(default_factory=lambda: Report(outcomes=1000))
    time: Time = Field(default_factory=Time)
    outputs: Outputs = Field(default_factory=Outputs)
    warm_start: Path | None = None
    audit: Audit | None = Field(default_factory=Audit)
    max_ids: int = Field(default=200_000, ge=0)
    max_models: int = Field(default=100_000, gt=0)

    def __init__(self, **named: Any) -> None:
        if isinstance(named.get("per"), str):
            named["per"] = (named["per"],)
        with faults_of("Job"):
            super().__init__(**named)

    def model_post_init(self, _: Any) -> None:
        if not _NAME.fullmatch(self.name):
            raise JobError(f"Job: name {self.name!r} may hold letters, digits, '-' and '_' only")
        self._check_fields()
        self._check_names()
        check_model(self.model)
        self._check_metrics()

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The keyed features, in order of declaration."""
        return tuple(f for f in self.features if isinstance(f, Entity))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What the model sees, in the order of the declarations."""
        return tuple(name for feature in self.features for name in feature.feature_names)

    @property
    def record_key(self) -> tuple[str, ...] | None:
        """The fields by which predictions and outcomes are keyed; None where no output wants it, or it is the id."""
        if not any(sink is not None and sink.keyed for sink in (self.outputs.predictions, self.outputs.outcomes)):
            return None
        return self.outputs.key or self.per or next((entity.key for entity in self.entities), None)

    @property
    def model_name(self) -> str:
        """The class of the model that answers, in a pipeline its last step."""
        return type(final_step(self.model)).__name__

    @property
    def binary(self) -> bool:
        """Whether the label is True or False, so that a classifier's output is one probability."""
        return bool in plain_types(self.label_class.model_fields[self.label.field].annotation)

    @property
    def label_class(self) -> type[Event]:
        """The event class that holds the label."""
        return self.events.event if self.label.source is None else self.label.source.event

    @property
    def trusted_columns(self) -> frozenset[str]:
        """Fields whose values pydantic has made finite floats, bools or None: no aggregate can object to them."""
        fields = dict(self.events.event.model_fields)
        fields[self.label.field] = self.label_class.model_fields[self.label.field]
        derived = {f.name for f in self.features if isinstance(f, Derived)}
        safe = {float, bool}
        return frozenset(n for n, f in fields.items() if n not in derived and plain_types(f.annotation) <= safe)

    def changed(self, **parts: Any) -> Job:
        """The job with some parts replaced, checked again as a whole."""
        return Job(**{name: getattr(self, name) for name in type(self).model_fields} | parts)

    def play(self, events: Any = None, labels: Any = None) -> Iterator[Record]:
        """Run in plain Python, without an engine: an iterator of Predictions, Outcomes, Metrics and Rejects.

        `events` and `labels` are iterables of event objects, dicts or JSON bytes; left out, the declared
        sources are read to their end. The results are those of `millrace run`, to the last bit.
        """
        from dataflows.replay import play  # the declaration stays free of what runs it

        return play(self, events, labels)

    def at(self, checkpoint: str = "latest", directory: Path | None = None) -> PastState:
        """The state of this job's run at a checkpoint, savepoint, batch or event time, also while it runs.

        `job.at("2026-04-20T12:00Z").features(card_id=42)`; see `dataflows.history.open_state` for what can be named,
        and `PastState` for what can be asked.
        """
        from dataflows.history import open_state
        from dataflows.settings import RunDirectory

        run = RunDirectory(directory) if directory is not None else RunDirectory.of(self)
        return open_state(self, run, checkpoint)

    def _check_fields(self) -> None:
        event = self.events.event
        known = set(event.model_fields) | {f.name for f in self.features if isinstance(f, Derived)}
        for feature in self.features:
            if isinstance(feature, Fields):
                _require(feature.names, set(event.model_fields), f"Fields{feature.names}", event)
            elif isinstance(feature, Lookup):
                _require([feature.key], known, f"Lookup key {feature.key!r}", event)
            elif isinstance(feature, Entity):
                columns = set(feature.columns) - ({self.label.field} if feature.of == "labels" else set())
                _require(feature.key, known, f"Entity key {feature.key}", event)
                _require(sorted(columns), known, f"Entity by {feature.label}", event)
        _require(self.per or (), known, f"per={self.per}", event)
        _require(self.outputs.key or (), known, f"Outputs key={self.outputs.key}", event)
        _require(self.label.by or (), known, f"Label by={self.label.by}", event)
        _require([self.label.field], set(self.label_class.model_fields), "Label field", self.label_class)
        if isinstance(self.label.delay, str):
            self._check_delay_field(self.label.delay)
        if self.label.kind == "stream":
            self._check_match()
        elif self.label.kind == "field":
            self._check_leaks()

    def _check_delay_field(self, name: str) -> None:
        event = self.events.event
        if name not in event.model_fields:
            raise JobError(
                f"Job: Label delay={name!r} is neither a duration nor a field of {event.__name__}. "
                "Hint: '7d', '30m', '90s', a timedelta, or a field that holds one"
            )
        kinds = plain_types(event.model_fields[name].annotation)
        if not kinds <= {int, str, timedelta}:
            raise JobError(
                f"Job: Label delay={name!r}: the field holds no duration (text such as '7d', a timedelta, or an int of "
                "microseconds). Hint: delay=lambda event: timedelta(seconds=event.seconds)"
            )

    def _check_leaks(self) -> None:
        """Nothing from the future: the field that will be the label is not there yet when the question is asked."""
        for feature in self.features:
            used: set[str] = set()
            if isinstance(feature, Fields):
                used = set(feature.names)
            elif isinstance(feature, Lookup):
                used = {feature.key}
            elif isinstance(feature, Entity):
                used = set(feature.key) | (set(feature.columns) if feature.of == "events" else set())
            used |= _attributes_read(getattr(feature, "fn", None)) | _attributes_read(getattr(feature, "where", None))
            if self.label.field in used:
                raise JobError(
                    f"Job: {self.label.field!r} is the label, known only after the question, so no feature may read "
                    "it from the event. Hint: Entity(..., of='labels') sees labels once they are revealed"
                )
        if self.label.field in (self.per or ()):
            raise JobError(f"Job: per={self.per} names the label, which nobody knows when the question is asked")

    def _check_match(self) -> None:
        event, label = self.events.event, self.label_class
        if self.label.on is None:
            if event.id_field is None or label.id_field is None:
                raise JobError(
                    f"Label: {event.__name__} and {label.__name__} are matched by id, so both must name one. "
                    "Hint: class X(Event, id='FIELD', ...), or match by entity and time with on=, at="
                )
            self._check_same_type(event.id_field, label.id_field)
            return
        for name in self.label.on:
            if name in event.model_fields and name in label.model_fields:
                self._check_same_type(name, name)
        _require(self.label.on, set(label.model_fields), f"Label on={self.label.on}", label)
        _require(self.label.on, set(event.model_fields), f"Label on={self.label.on}", event)
        _require([self.label.at or ""], set(label.model_fields), f"Label at={self.label.at!r}", label)
        kinds = plain_types(label.model_fields[self.label.at or ""].annotation)
        if kinds != {datetime} and not (kinds <= {int, float} and event.time_scale is not None):
            raise JobError(
                f"Job: Label at={self.label.at!r} must hold the event time of {event.__name__}: a datetime, "
                "or a number where its time is one (then in the same unit)"
            )

    def _check_same_type(self, of_event: str, of_label: str) -> None:
        event, label = self.events.event, self.label_class
        kinds = [
            plain_types(event.model_fields[of_event].annotation), plain_types(label.model_fields[of_label].annotation)
        ]  # fmt: skip
        if kinds[0] != kinds[1]:
            raise JobError(
                f"Job: {event.__name__}.{of_event} and {label.__name__}.{of_label} are matched but of different types, "
                f"{kinds[0]} and {kinds[1]}, so no label would ever find its question"
            )

    def _check_names(self) -> None:
        seen: set[str] = set()
        for name in self.feature_names:
            if name in seen:
                raise JobError(f"Job: two features are named {name!r}. Hint: give one of them name=")
            seen.add(name)
        if not seen:
            raise JobError("Job: there are no features to learn from. Hint: features=[Fields('amount'), ...]")

    def _check_metrics(self) -> None:
        for metric in self.metrics:
            inner = metric.obj if isinstance(metric, utils.Rolling) else metric
            if not isinstance(inner, metrics.base.Metric):
                raise JobError(f"Job: metrics hold {metric!r}, which is no river metric. Hint: metrics.ROCAUC()")
            if not inner.works_with(self.model):
                raise JobError(f"Job: {type(inner).__name__} cannot measure a {self.model_name}")
            if not _gives_number(metric):
                raise JobError(f"Job: {type(inner).__name__} gives no number to report. Hint: metrics.ROCAUC()")


def _attributes_read(function: Any) -> set[str]:
    """The attributes that a plain function reads, of whatever object: enough to find one that reads the label."""
    code = getattr(function, "__code__", None)
    return set() if code is None else set(code.co_names)


def _gives_number(metric: Any) -> bool:
    try:
        float(pickle.loads(pickle.dumps(metric)).get())
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        return False
    return True


def final_step(model: Any) -> Any:
    """The last step of a pipeline, or the model itself."""
    steps = getattr(model, "steps", None)
    return final_step(list(steps.values())[-1]) if isinstance(steps, dict) else model


def check_model(model: Any) -> None:
    """Raise `JobError` for what cannot answer questions the same way twice."""
    step = final_step(model)
    if not isinstance(step, base.Classifier | base.Regressor) and not hasattr(step, "score_one"):
        raise JobError(
            f"Job: the model ends in {type(step).__name__}, which cannot answer. "
            "Hint: a river classifier, regressor or anomaly detector, or a pipeline ending in one"
        )
    for path, estimator in _estimators(model, type(model).__name__):
        if "seed" in inspect.signature(type(estimator).__init__).parameters and _seed(estimator) is None:
            raise JobError(f"Job: {path} draws unseeded random numbers. Hint: {type(estimator).__name__}(seed=1)")
    try:
        pickle.dumps(model)
    except Exception as error:  # noqa: BLE001 - pickling runs code of the model's
        raise JobError(f"Job: the model cannot be pickled, so not checkpointed: {error}") from None


def _seed(estimator: Any) -> Any:
    return getattr(estimator, "seed", getattr(estimator, "_seed", None))


def _estimators(model: Any, path: str) -> Any:
    """The model and all estimators in its parameters and steps, with a path to name each."""
    yield path, model
    parts: dict[Any, Any] = dict(model._get_params()) if isinstance(model, base.Base) else {}
    for holder in ("steps", "transformers", "models"):
        held = getattr(model, holder, None)
        parts |= held if isinstance(held, dict) else {f"{holder}[{i}]": m for i, m in enumerate(_listed(held))}
    for name, part in parts.items():
        for i, one in enumerate([part, *_listed(part), *(part.values() if isinstance(part, dict) else ())]):
            if isinstance(one, base.Base):
                yield from _estimators(one, f"{path}.{name}" if i == 0 else f"{path}.{name}[{i - 1}]")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _require(names: Any, known: set[str], what: str, event: type[Event]) -> None:
    for name in names:
        if name not in known:
            raise JobError(f"Job: {what}: {event.__name__} has no field {name!r} (it has {', '.join(sorted(known))})")


def delay_function(label: Label) -> Callable[[Event], int]:
    """The delay of a field's label as a function of the event, in microseconds."""
    delay = label.delay
    if isinstance(delay, str):
        name = delay
        return lambda event: duration(getattr(event, name))
    if callable(delay):
        return lambda event: duration(delay(event))
    return lambda event: delay


__all__ = [
    "DISCARD",
    "KINDS",
    "Job",
    "JobError",
    "Label",
    "Output",
    "Outputs",
    "Report",
    "Sink",
    "SinkError",
    "SinkWriter",
]
