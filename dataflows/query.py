"""Looking into state: features, open questions, models and metrics as of a checkpoint, while the job runs on.

Nothing is locked and nothing is written: SQLite gives every reader the files as they were when it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from dataflows.admit import GLOBAL_GROUP, Admit
from dataflows.bundle import models_of
from dataflows.changes import declared, gone_names
from dataflows.checkpoints import Checkpoints, Manifest, missing_parts
from dataflows.evaluate import Publisher
from dataflows.events import to_datetime
from dataflows.job import Job, JobError
from dataflows.learner import MODELS, Learner
from dataflows.pickles import names_of
from dataflows.replay import entity_features
from dataflows.rows import entity_step_names, key_getter, key_group
from dataflows.settings import Layout, RunDirectory, read_branches
from dataflows.state import HINT, READER, StateError, StateStore, StepRows, group_file
from features.parts import FeatureParts
from features.rows import key_of, key_text
from features.spec import Derived, Entity
from features.state import EntityState


class Question(NamedTuple):
    """A question that waits for its label: what was asked, what was said."""

    number: int
    id: Any
    time: datetime
    features: dict[str, Any]
    output: Any
    model_version: int


class ModelState(NamedTuple):
    """A model: the river object, its name, and how many examples it has learned from."""

    model: Any
    name: str
    version: int


class PastState:
    """All state of a job at one checkpoint. Changing what it gives changes nothing in the store.

    Parameters
    ----------
    job
        The job as it is declared now.
    run
        Where its run lies.
    manifest
        The checkpoint.

    Raises `StateError` when the checkpoint was dropped meanwhile, or a file is missing or damaged.
    """

    def __init__(self, job: Job, run: RunDirectory, manifest: Manifest) -> None:
        self.job = job
        self.manifest = manifest
        self._run = run
        branch = next((start for start in read_branches(run) if start.branch == manifest.branch), None)
        self.layout = Layout() if branch is None else branch.layout
        self._groups: int = manifest.job["groups"]
        self._store = StateStore(
            run.groups, manifest.lineage, writable=False, allowed=names_of(job), gone=gone_names(self.layout, job)
        )
        try:
            self._begin_reading(run)
        except BaseException:
            self.close()
            raise

    def _begin_reading(self, run: RunDirectory) -> None:
        version = self.manifest.version
        for path in sorted(run.groups.glob("*.sqlite3")):
            self._store.file(path.stem).begin_reading()
        # Pruning takes the manifest away first: one that is still there had all its rows when reading began.
        if version.batch and version not in {m.version for m in Checkpoints(run).all()}:
            raise StateError(f"checkpoint {version} was dropped just now. Hint: try again with a newer one")
        missing = missing_parts(self.manifest, self._store)
        if missing:
            raise StateError(f"checkpoint {version} cannot be opened: {missing[0]}. {HINT}")

    @classmethod
    def open(cls, job: Job, run: RunDirectory, at: str = "latest") -> PastState:
        """The state at a checkpoint (`1-420`), a savepoint, or the newest checkpoint (`latest`)."""
        for _ in range(3):  # the newest may be dropped between finding and opening it
            try:
                return cls(job, run, Checkpoints(run).find(at))
            except StateError as error:
                if at != "latest" or "just now" not in str(error):
                    raise
        return cls(job, run, Checkpoints(run).find(at))

    @property
    def clock(self) -> int:
        """The newest event time (µs)."""
        return self.manifest.clock or 0

    # -- for people

    def features(self, **entity: Any) -> dict[str, Any]:
        """The features that are keyed by these fields, as of the checkpoint's newest event time.

        `job.at("latest").features(card_id=42)`. Raises `JobError` where no features are keyed so.
        """
        found: dict[str, Any] = {}
        for name, declaration in zip(entity_step_names(self.job), self.job.entities, strict=True):
            key = self._key(declaration.key, entity)
            if key is not None:
                features = self._features(f"features_{name}", declaration, key_group(key, self._groups))
                found |= dict(zip(declaration.feature_names, features.read(key, self.clock), strict=True))
        if not found:
            keys = sorted({", ".join(declaration.key) for declaration in self.job.entities})
            raise JobError(
                f"no features of {self.job.name} are keyed by {', '.join(entity)}. "
                f"Hint: there are those by {'; '.join(keys)}"
            )
        return found

    def open_questions(self, **entity: Any) -> list[Question]:
        """The questions that wait for their labels: all, or those of an entity, in the order they were asked."""
        numbers: set[int] | None = None
        if entity:
            numbers = set()
            keys = {d.key: key for d in self.job.entities if (key := self._key(d.key, entity)) is not None}
            # An open question has the keys of all declarations: one that is asked about is enough.
            for number, (names, *values) in self.admit().open_questions():
                if any(keys.get(n) == value for n, value in zip(names, values, strict=True) if n in keys):
                    numbers.add(number)
        return sorted(q for q in self._questions() if numbers is None or q.number in numbers)

    def model(self, **entity: Any) -> ModelState | None:
        """The model (of an entity, for a job with one for each); None before it has answered."""
        key, group = self._model_place(entity)
        kept = self._rows(group_file(group), "learner").get(f"{self._models}/{key_text(key)}")
        return ModelState(*kept[0]) if kept else None

    def _model_place(self, entity: dict[str, Any]) -> tuple[Any, int]:
        """The key of a model and its key group."""
        if self.job.per is None:
            return None, GLOBAL_GROUP % self._groups
        key = self._key(self.job.per, entity)
        if key is None:
            raise JobError(f"{self.job.name} has a model for each {', '.join(self.job.per)}. Hint: say which")
        return key, key_group(key, self._groups)

    def metrics(self) -> dict[str, float | None]:
        """The metrics by name."""
        return self.publisher().evaluator.values()

    # -- all of it

    def entities(self, step: str) -> Iterator[tuple[Any, EntityState]]:
        """Every entity of the rows of a feature step (a part's, where it has several), with its state."""
        declaration = self._declaration(step)
        for group in range(self._groups):
            rows = self._rows(group_file(group), step)
            features = entity_features(self.job, declaration, rows)
            for text, parts in rows.scan(""):
                yield key_of(text), features.rebuilt(parts)

    def models(self) -> dict[Any, ModelState]:
        """All models by key (None: the global one)."""
        found: dict[Any, ModelState] = {}
        for group in range(self._groups):
            for text, (kept,) in self._rows(group_file(group), "learner").scan(f"{self._models}/"):
                found[key_of(text.removeprefix(f"{self._models}/"))] = ModelState(*kept)
        return found

    def admit(self) -> Admit:
        """What admit held: ids, open questions, labels that came early."""
        return Admit(self.job, self._groups, self._rows(READER, "admit"))

    def publisher(self) -> Publisher:
        """The metrics and counts."""
        rows = self._rows(group_file(GLOBAL_GROUP % self._groups), "publish")
        return Publisher(self.job, rows, self.layout.metrics)

    def reader(self) -> dict[str, list[Any]]:
        """The reader's rows as they are: positions, watermark, buffered items."""
        return dict(self._rows(READER, "read").scan(""))

    def counts(self) -> dict[str, int]:
        """How many entities each feature step keeps, by the name of its rows: of each part, where it has several."""
        counts: dict[str, int] = {}
        for parts in self.layout.features.values():
            for part in parts:
                groups = range(self._groups)
                counts[part.rows] = sum(self._rows(group_file(group), part.rows).count() for group in groups)
        return counts

    def scan(self, rows: str) -> Iterator[tuple[str, list[Any]]]:
        """The rows of a feature step by name, of all key groups, as they are kept."""
        for group in range(self._groups):
            yield from self._rows(group_file(group), rows).scan("")

    def close(self) -> None:
        """Give the files up."""
        self._store.close()

    # -- inside

    @property
    def _models(self) -> str:
        return MODELS if self.layout.models == 1 else f"{MODELS}{self.layout.models}"

    def _rows(self, file: str, step: str) -> StepRows:
        return self._store.file(file).rows(step, self._store.lineage)

    def _declaration(self, rows: str) -> Entity:
        for parts in self.layout.features.values():
            for part in parts:
                if part.rows == rows:
                    return declared(part, self.job)
        raise StateError(f"there is no feature step {rows!r}. Hint: {', '.join(self.layout.features)}")

    def _features(self, step: str, declaration: Entity, group: int) -> FeatureParts:
        parts = [
            (entity_features(self.job, declared(part, self.job), self._rows(group_file(group), part.rows)), part.names)
            for part in self.layout.features.get(step, ())
        ]
        if {name for _, names in parts for name in names} != set(declaration.feature_names):
            raise StateError(
                f"checkpoint {self.manifest.version} does not hold all of {', '.join(declaration.feature_names)}: "
                "the job was changed since. Hint: ask with the job file as it was"
            )
        return FeatureParts(declaration, parts)

    def _learner(self, group: int) -> Learner:
        warm = models_of(self.job, self._run)
        return Learner(self.job, self._rows(group_file(group), "learner"), self.layout.models, warm=warm)

    def _questions(self) -> Iterator[Question]:
        for group in range(self._groups):  # with one model too: `per` may have changed since some were asked
            learner = self._learner(group)
            for number, (id, at, kept, output, _, version, _) in learner.open_questions():
                names = self.job.feature_names
                features = dict(zip(names, kept, strict=True)) if type(kept) is tuple else kept or {}
                yield Question(number, id, at, features, output, version)

    def _key(self, names: tuple[str, ...], entity: dict[str, Any]) -> Any:
        """The key of an entity from values by field, as text or as they are; None where a field is not given."""
        if not set(names) <= set(entity):
            return None
        return key_getter(names, self.job)({name: typed(self.job, name, entity[name]) for name in names})


def typed(job: Job, name: str, value: Any) -> Any:
    """A value given as text in the type of its field; of a Derived, whose type nobody knows, an int if possible."""
    fields = job.events.event.model_fields
    if name not in fields or any(isinstance(f, Derived) and f.name == name for f in job.features):
        return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value
    try:
        return TypeAdapter[Any](fields[name].annotation or str).validate_python(value)
    except ValidationError as error:
        raise JobError(f"{name}={value!r}: {error.errors()[0]['msg']}") from None


def describe_time(manifest: Manifest) -> str:
    """The event time of a checkpoint, for people."""
    return "-" if manifest.clock is None else f"{to_datetime(manifest.clock):%Y-%m-%d %H:%M}"
