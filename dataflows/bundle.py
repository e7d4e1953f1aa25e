"""Bundles: models with what is needed to use them elsewhere, in one file.

A zip archive with `about.json` for people and machines (whose model it is, what taught it, what made it),
`models.pickle` and, if they were wanted, the features of every entity. What is pickled is opened with the classes of a
job that is at hand, and with no others: a bundle from elsewhere brings no code along.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dataflows.changes import declared, declared_text
from dataflows.job import Job, JobError, final_step
from dataflows.pickles import names_of, safe_loads
from dataflows.settings import FeaturePart, RunDirectory
from features.spec import Entity

FORMAT = 1

Warm = dict[str, tuple[bytes, int]]
"""Models to begin with: by the text of their keys, the pickled model and the examples it has learned."""

Part = tuple[tuple[str, ...], str, dict[str, list[Any]]]
"""Features of one part of a step's state: their names, the part's declaration (`FeaturePart`), its rows by key."""


class Bundle(NamedTuple):
    """What a bundle holds; `features` by feature step."""

    about: dict[str, Any]
    models: Warm
    features: dict[str, list[Part]]


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle whole or not at all."""
    parts = {"models.pickle": pickle.dumps(bundle.models, 5)}
    parts |= {f"features/{step}.pickle": pickle.dumps(some, 5) for step, some in bundle.features.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    about = msgspec.json.encode(bundle.about | {"format": FORMAT, "sha256": digests}, enc_hook=str)
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("about.json", msgspec.json.format(about, indent=1))
            for name, content in parts.items():
                archive.writestr(name, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_about(path: Path) -> dict[str, Any]:
    """What a bundle says of itself. Raises `JobError` for what is none."""
    return _read(path)[0]


def read_bundle(path: Path, job: Job) -> Bundle:
    """A bundle, opened with the classes of a job. Raises `JobError` for one that is damaged, or of another job."""
    about, parts = _read(path)
    allowed = names_of(job)
    try:
        models = safe_loads(parts.pop("models.pickle"), allowed)
        features = {
            name.removeprefix("features/").removesuffix(".pickle"): safe_loads(content, allowed)
            for name, content in parts.items()
        }
        found = msgspec.convert(features, dict[str, list[Part]])
        for names, declaration, _ in (part for parts_of in found.values() for part in parts_of):
            if not isinstance(declared(FeaturePart(rows="", names=names, declaration=declaration), job), Entity):
                raise TypeError("features in it are none")
        for pickled, examples in models.values():
            if type(pickled) is not bytes or type(examples) is not int:
                raise TypeError(f"a model in it is {type(pickled).__name__}, {type(examples).__name__}")
            model = safe_loads(pickled, allowed)
            if type(final_step(model)) is not type(final_step(job.model)):
                raise TypeError(f"a model in it is a {type(model).__name__}")
    except Exception as error:  # noqa: BLE001 - whatever a pickle of others raises
        raise JobError(
            f"{path} cannot be opened with {job.name}: {error}. Hint: is it the bundle of another job?"
        ) from None
    return Bundle(about, models, found)


class _Declared(msgspec.Struct):
    names: list[str]
    steps: dict[str, dict[str, Any]]


class _About(msgspec.Struct):
    """What a bundle has to say of itself; there is more."""

    format: int
    sha256: dict[str, str]
    job: str
    per: list[str] | None
    examples: dict[str, int]
    clock: int | None
    declared: _Declared
    made_by: dict[str, str]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            about: dict[str, Any] = msgspec.json.decode(archive.read("about.json"), type=dict[str, Any])
            if about.get("format") != FORMAT:
                raise JobError(f"{path} is a bundle of format {about.get('format')!r}, this reads {FORMAT}")
            msgspec.convert(about, _About)
            parts = {name: archive.read(name) for name in about["sha256"]}
    except FileNotFoundError:
        raise JobError(
            f"there is no bundle {path}. Hint: `millrace models JOB export VERSION FILE` makes one"
        ) from None
    except JobError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile raises whatever zlib, struct and codecs do
        raise JobError(f"{path} is no bundle, or damaged: {error}") from None
    for name, content in parts.items():
        if hashlib.sha256(content).hexdigest() != about["sha256"][name]:
            raise JobError(f"{path} is damaged: {name} is not as it was written")
    return about, parts


def check_models(about: dict[str, Any], job: Job, what: str) -> None:
    """Raise `JobError` where a bundle's models are not those that a job declares."""
    model, now = about["declared"]["steps"].get("learner", {}).get("model"), declared_text(job.model)
    if model != now:
        raise JobError(f"{what}: its model is {model}, and the job declares {now}")


def warm_models(job: Job, path: Path) -> Warm:
    """The models of a bundle for a job to begin with.

    One global model serves every key of a job with a model for each. Raises `JobError` where the models do not fit.
    """
    about, what = read_about(path), f"warm_start={path}"
    check_models(about, job, what)
    unlike = sorted(set(about["declared"]["names"]) ^ set(job.feature_names))
    if unlike:
        raise JobError(f"{what}: only one of the two has the features {', '.join(unlike)}")
    per = about["per"]
    if per is not None and tuple(per) != job.per:
        has = "one for all" if job.per is None else f"one for each {', '.join(job.per)}"
        raise JobError(f"{what}: it has a model for each {', '.join(per)}, and the job {has}. Hint: per={tuple(per)}")
    return read_bundle(path, job).models


def models_of(job: Job, run: RunDirectory | None = None) -> Warm:
    """What a job's models begin as: `warm_start`, from the copy that its run keeps where there is one."""
    kept = None if run is None else kept_bundle(job, run)
    if job.warm_start is None:
        return {}
    return warm_models(job, job.warm_start if kept is None else kept)


def kept_bundle(job: Job, run: RunDirectory) -> Path | None:
    """The copy of `warm_start` that a run keeps: the file may go, and the run still needs it."""
    if job.warm_start is None:
        return None
    kept = run.warm_start / job.warm_start.name
    return kept if kept.exists() else None
