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

from dataflows.changes import describe
from dataflows.job import Job, JobError
from dataflows.pickles import names_of, safe_loads

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
        for pickled, _ in models.values():
            safe_loads(pickled, allowed)
    except (pickle.UnpicklingError, ImportError, AttributeError, KeyError) as error:
        raise JobError(
            f"{path} cannot be opened with {job.name}: {error}. Hint: is it the bundle of another job?"
        ) from None
    return Bundle(about, models, features)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            about: dict[str, Any] = msgspec.json.decode(archive.read("about.json"))
            if about.get("format") != FORMAT:
                raise JobError(f"{path} is a bundle of format {about.get('format')!r}, this reads {FORMAT}")
            parts = {name: archive.read(name) for name in about["sha256"]}
    except FileNotFoundError:
        raise JobError(
            f"there is no bundle {path}. Hint: `millrace models JOB export VERSION FILE` makes one"
        ) from None
    except (zipfile.BadZipFile, KeyError, msgspec.DecodeError, IsADirectoryError) as error:
        raise JobError(f"{path} is no bundle, or damaged: {error}") from None
    for name, content in parts.items():
        if hashlib.sha256(content).hexdigest() != about["sha256"][name]:
            raise JobError(f"{path} is damaged: {name} is not as it was written")
    return about, parts


def warm_models(job: Job, path: Path) -> Warm:
    """The models of a bundle for a job to begin with.

    One global model serves every key of a job with a model for each. Raises `JobError` where the models do not fit.
    """
    bundle = read_bundle(path, job)
    declared, now = bundle.about["declared"], describe(job, 1)
    model, wanted = declared["steps"]["learner"]["model"], now["steps"]["learner"]["model"]
    if model != wanted:
        raise JobError(f"warm_start={path}: its model is {model}, and the job declares {wanted}")
    unlike = sorted(set(declared["names"]) ^ set(now["names"]))
    if unlike:
        raise JobError(f"warm_start={path}: only one of the two has the features {', '.join(unlike)}")
    return bundle.models


def models_of(job: Job, kept: Path | None = None) -> Warm:
    """What a job's models begin as: `warm_start`, from the copy that its run keeps where there is one."""
    if job.warm_start is None:
        return {}
    return warm_models(job, kept if kept is not None and kept.exists() else job.warm_start)
