"""Lineage: each version of a model, what it grew from, what taught it, and what made it; and its export.

A version is the number of examples that a model has learned. Every one can be had: the nearest keyframe of the learn
log before it, and the examples after that learned again.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

from dataflows.admit import GLOBAL_GROUP
from dataflows.bundle import Bundle, Part, read_about
from dataflows.changes import declared_text, describe
from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.events import to_datetime
from dataflows.history import open_state
from dataflows.job import Job, JobError, final_step
from dataflows.learner import model_named
from dataflows.learnlog import PROTOTYPE
from dataflows.learnstore import Frame, LearnReader, open_logs
from dataflows.pickles import names_of
from dataflows.query import PastState
from dataflows.relearn import END, Broken, Relearning, Said, Segment, Taught
from dataflows.rows import key_group
from dataflows.settings import RunDirectory, Start, read_branches
from dataflows.startup import read_job
from dataflows.state import StateError, Version, group_file
from features.rows import key_of, key_text

_VERSION = re.compile(r"(?:(\d+):)?(\d+)")


class Listed(NamedTuple):
    """A version of a model that has a keyframe.

    `examples` it has learned, `since` those since the version before in the list (`grew_from`), up to the event time
    `newest` (µs). `metrics` are those of `checkpoint`, the last one retained that is not later.
    """

    version: str
    model: str
    examples: int
    grew_from: str
    since: int
    newest: int
    batch: Version
    commit: str
    checkpoint: str | None
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Detail:
    """One version of a model: all there is to know, and the model itself."""

    version: str
    name: str
    key: Any
    examples: int
    grew_from: str
    first: Taught | None
    last: Taught | None
    batch: Version
    hyperparameters: str
    maker: dict[str, str]
    checkpoint: str | None
    outcomes: int
    metrics: dict[str, float | None]
    model: Any


class Models:
    """The versions of a run's models.

    Parameters
    ----------
    job, run
        The job, and where its run lies; it may go on meanwhile.

    Raises `StateError` where there is no learn log.
    """

    def __init__(self, job: Job, run: RunDirectory) -> None:
        self._job, self._run = job, run
        self._branches = read_branches(run)
        newest = self._branches[-1]
        self._begun = newest.layout.models
        self._way = newest.lineage.on_from_here()
        self._logs = open_logs(run, self._way, names_of(job))
        self._states: dict[Version, dict[str, float | None]] = {}
        self._names: dict[LearnReader, Callable[[int, int, Any], str]] = {}

    def close(self) -> None:
        """Give the logs up."""
        for log in self._logs:
            log.close()

    def list(self, key: Any = None, limit: int = 20) -> list[Listed]:
        """The newest versions of a model, oldest first; without a key those of all models."""
        frames = [
            (log, frame)
            for log in self._logs
            for frame in log.frames()
            if frame.key != PROTOTYPE and (key is None or frame.key == key_text(key))
        ]
        frames.sort(key=lambda pair: (pair[1].version, pair[1].place))
        before: dict[tuple[int, str], Frame] = {}
        found = []
        for number, (log, frame) in enumerate(frames):
            parent = before.get((frame.begun, frame.key))
            before[frame.begun, frame.key] = frame
            if number >= len(frames) - limit:
                found.append(self._listed(log, frame, parent))
        return found

    def _listed(self, log: LearnReader, frame: Frame, parent: Frame | None) -> Listed:
        maker = next((log.makers[head.maker] for head in log.heads if head.version >= frame.version), {})
        manifest = self._checkpoint(frame.version)
        return Listed(
            self._text(frame.begun, frame.examples), self._name(log, frame, frame.key), frame.examples,
            self._origin(frame, parent),
            frame.examples - (0 if parent is None else parent.examples), frame.newest, Version.of(frame.version),
            maker.get("commit", "-"), None if manifest is None else str(manifest.version), self._metrics(manifest),
        )  # fmt: skip

    def show(self, version: str, key: Any = None) -> Detail:
        """One version. Raises `StateError` where what is needed for it is not kept."""
        if version == "latest":
            version = str(self._newest(key))
        named = _VERSION.fullmatch(version)
        if named is None:
            raise JobError(
                f"{version!r} is no version. Hint: the number of examples it had learned, as listed, or `latest`"
            )
        begun, examples, text = int(named[1] or self._begun), int(named[2]), key_text(key)
        if begun == self._begun and key is None and self._job.per is not None:
            per = ", ".join(self._job.per)
            raise JobError(f"{self._job.name} has a model for each {per}. Hint: --entity says which")
        log, exact, before = self._nearest(begun, key, examples)
        frame = before or exact
        assert frame is not None
        again = Relearning(log, [Segment(text, frame, END)])
        try:
            first, last, at = self._learn_up_to(again, text, examples, frame)
            model = again.models(begun)[text][0] if exact is None else log.model(exact)
        except StateError:
            if exact is None or exact.key == PROTOTYPE:
                raise
            # What it learned since is not kept, or it began as it is: the keyframe itself is there.
            first, last, at, model = None, None, exact.version, log.model(exact)
            before = None if before is None or before.key == PROTOTYPE else before
        manifest = self._checkpoint(at)
        makers = [log.makers[head.maker] for head in log.heads if frame.version <= head.version <= at]
        return Detail(
            self._text(begun, examples), self._name(log, frame, text), key, examples,
            self._origin(exact or frame) if before is None else self._grew_from(before), first, last, Version.of(at),
            declared_text(model), makers[-1] if makers else {}, None if manifest is None else str(manifest.version),
            0 if manifest is None else self._outcomes(manifest), self._metrics(manifest), model,
        )  # fmt: skip

    def _newest(self, key: Any) -> int:
        """The version in the newest checkpoint."""
        with closing(open_state(self._job, self._run)) as past:
            found = past.models().get(key)
        if found is None:
            raise StateError("there is no such model in the newest checkpoint. Hint: `millrace models JOB` lists them")
        return found.version

    def _nearest(self, begun: int, key: Any, examples: int) -> tuple[LearnReader, Frame | None, Frame | None]:
        """The log of a model, its keyframe with so many examples, and the last one with fewer; at least one of them."""
        groups = int(read_job(self._run)["groups"])
        name = group_file(GLOBAL_GROUP % groups if key is None else key_group(key, groups))
        log = next((log for log in self._logs if log.path.stem == name), None)
        if log is not None:
            mine = [f for f in log.frames() if f.begun == begun and f.key in (key_text(key), PROTOTYPE)]
            own_last = sorted(mine, key=lambda frame: (frame.examples, frame.key != PROTOTYPE))
            exact = [frame for frame in own_last if frame.examples == examples]
            before = [frame for frame in own_last if frame.examples < examples]
            if exact or before:
                return log, exact[-1] if exact else None, before[-1] if before else None
        raise self._missing(examples, key_text(key))

    def _missing(self, examples: int, key: str) -> StateError:
        whose = "" if self._job.per is None else f" of {model_named(self._job.model_name, self._job.per, key_of(key))}"
        return StateError(
            f"version {examples:,}{whose} is not in the learn log: it is not kept any more, or there was never such a "
            "model. Hint: `millrace models JOB` lists what there is"
        )

    def _origin(self, frame: Frame, parent: Frame | None = None) -> str:
        """What a version grew from: the one before, or what it began as."""
        if parent is not None:
            return self._text(parent.begun, parent.examples)
        for bundle in sorted(self._run.warm_start.glob("*")) if frame.key != PROTOTYPE else ():
            about = read_about(bundle)
            if about["examples"].get(frame.key, about["examples"].get(key_text(None))) == frame.examples:
                return f"the bundle of {about['job']}, {frame.examples:,} examples"
        return "the model as declared"

    def _grew_from(self, frame: Frame) -> str:
        """What a version grew from that was reached from a keyframe."""
        origin = self._origin(frame)
        is_first = frame.key == PROTOTYPE or origin != "the model as declared"
        return origin if is_first else self._text(frame.begun, frame.examples)

    def _text(self, begun: int, examples: int) -> str:
        return str(examples) if begun == self._begun else f"{begun}:{examples}"

    def _name(self, log: LearnReader, frame: Frame, key: str) -> str:
        if log not in self._names:
            self._names[log] = names_of_models(self._job, self._branches, log)
        return self._names[log](frame.version, frame.begun, key_of(key))

    def _learn_up_to(
        self, again: Relearning, key: str, examples: int, frame: Frame
    ) -> tuple[Taught | None, Taught | None, int]:  # fmt: skip
        """Learn again until so many examples are known: the first and the last of them, and the chunk of the last.

        Raises `StateError` where the log does not have what was learned, or where there was never such a model.
        """
        first: Taught | None = None
        last: Taught | None = None
        at = frame.version
        is_known = frame.key != PROTOTYPE  # as a prototype everybody begins, also who never came
        for step in again.run() if frame.examples < examples or not is_known else ():
            if isinstance(step, Broken):
                raise StateError(f"version {examples:,} cannot be made again: {step.text}")
            if isinstance(step, Said) and step.version != step.examples:
                if not is_known:
                    raise self._missing(examples, key)
                raise StateError(f"version {examples:,} cannot be made again: examples before it are not kept any more")
            is_known = is_known or isinstance(step, Said)
            if is_known and frame.examples == examples:
                break
            if isinstance(step, Said | Taught):
                at = step.place[0]
            if isinstance(step, Taught):
                first, last = first or step, step
            if isinstance(step, Said | Taught) and again.models(frame.begun)[key][1] == examples:
                break
        if not is_known:
            raise self._missing(examples, key)
        reached = again.models(frame.begun)[key][1] if frame.examples < examples else examples
        if reached != examples:
            raise StateError(f"the model has learned {reached:,} examples by now, not {examples:,}")
        return first, last, at

    # -- checkpoints around

    def _checkpoint(self, version: int) -> Manifest | None:
        way = self._way
        return max(
            (m for m in Checkpoints(self._run).all() if way.holds(m.version.number) and m.version.number <= version),
            key=lambda m: m.version,
            default=None,
        )

    def _metrics(self, manifest: Manifest | None) -> dict[str, float | None]:
        if manifest is None:
            return {}
        if manifest.version not in self._states:
            try:
                with closing(PastState(self._job, self._run, manifest)) as past:
                    self._states[manifest.version] = past.metrics()
            except StateError:  # dropped just now
                self._states[manifest.version] = {}
        return self._states[manifest.version]

    def _outcomes(self, manifest: Manifest) -> int:
        try:
            with closing(PastState(self._job, self._run, manifest)) as past:
                return past.publisher().evaluator.outcomes
        except StateError:
            return 0

    # -- export

    def export(self, version: str, key: Any = None, features: bool = True) -> Bundle:
        """A version with what is needed to use it elsewhere; `latest` is that of the newest checkpoint, of all models.

        The features are as of the checkpoint, or of the batch in which the version came to be.
        """
        if version == "latest":
            with closing(open_state(self._job, self._run)) as past:
                models = {key_text(k): (pickle.dumps(m.model, 5), m.version) for k, m in past.models().items()}
                if key is not None:
                    models = {text: each for text, each in models.items() if text == key_text(key)}
                kept = features_of(past) if features else {}
                about = self._about(past, {text: examples for text, (_, examples) in models.items()}, None)
            return Bundle(about, models, kept)
        detail = self.show(version, key)
        models = {key_text(key): (pickle.dumps(detail.model, 5), detail.examples)}
        with closing(open_state(self._job, self._run, str(detail.batch))) as past:
            kept = features_of(past) if features else {}
            about = self._about(past, {key_text(key): detail.examples}, detail)
        return Bundle(about, models, kept)

    def _about(self, past: PastState, examples: dict[str, int], detail: Detail | None) -> dict[str, Any]:
        maker = past.manifest.environment if detail is None else detail.maker
        about: dict[str, Any] = {
            "job": self._job.name,
            "per": self._job.per,
            "examples": examples,
            "as_of": str(past.manifest.version),
        }
        about |= {"clock": past.manifest.clock, "declared": describe(self._job, 1), "made_by": maker}
        if detail is not None:
            about |= {"grew_from": detail.grew_from, "taught_by": [_example(detail.first), _example(detail.last)]}
        return about | {"metrics": past.metrics() if detail is None else detail.metrics}


def names_of_models(
    job: Job, branches: Sequence[Start], log: LearnReader
) -> Callable[[int, int, Any], str]:  # fmt: skip
    """Names the models of a learn log as they were called then, by version, how often they were begun, and key."""
    per = {start.branch: start.job.get("steps", {}).get("learner", {}).get("per") for start in branches}
    classes = {branches[-1].layout.models: job.model_name}
    for frame in log.frames() if any(head.begun not in classes for head in log.heads) else ():
        if frame.key == PROTOTYPE and frame.begun not in classes:
            try:
                classes[frame.begun] = type(final_step(log.model(frame))).__name__
            except StateError:  # its class is gone from the job
                classes[frame.begun] = job.model_name

    def name(version: int, begun: int, key: Any) -> str:
        names = per.get(Version.of(version).branch)
        each = job.per if names is None else tuple(names) or None
        return model_named(classes.get(begun, job.model_name), each, key)

    return name


def _example(taught: Taught | None) -> dict[str, Any] | None:
    if taught is None:
        return None
    return {"id": taught.id, "label": taught.label, "known": to_datetime(taught.moment).isoformat()}


def features_of(past: PastState) -> dict[str, list[Part]]:
    """The features of all entities, as a bundle keeps them."""
    found: dict[str, list[Part]] = {}
    for step, parts in past.layout.features.items():
        found[step] = [(part.names, part.declaration, dict(past.scan(part.rows))) for part in parts]
    return found
