"""Changing a job that has state: what becomes of the state, step by step, decided before anything is started.

What is added starts empty, what is removed is dropped, and both are said. What would keep state under another meaning
(a window of another length, another model, another key) is refused, until `--reset STEP` says that the step shall begin
anew.
"""

from __future__ import annotations

import base64
import pickle
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from pydantic import BaseModel
from river import base, compose, utils

from dataflows.evaluate import metric_names
from dataflows.job import Job
from dataflows.pickles import Gone, Name, lost_names, names_in, names_of, safe_loads
from dataflows.rows import entity_step_names
from dataflows.settings import FeaturePart, Layout
from dataflows.state import StateError
from features.spec import Entity

_GONE: Name = (Gone.__module__, Gone.__qualname__)


class Change(NamedTuple):
    """What a changed declaration does to the state of a step. `refused`: it needs `--reset` (or undoing).

    Not to be taken for the change of a row, `features.rows.Change`.
    """

    step: str
    text: str
    refused: bool = False


Description = dict[str, Any]


def describe(job: Job, groups: int) -> Description:
    """What state depends on, by step, as plain values to compare and to show."""
    steps: Description = {
        "read": {"order": job.time.order, "lateness": job.time.lateness},
        "admit": _label(job),
        "learner": {"model": declared_text(job.model), "per": list(job.per or ())} | _begin(job),
        "publish": {"metrics": dict(zip(metric_names(job), map(declared_text, job.metrics), strict=True))},
    }
    for step, entity in _feature_steps(job):
        steps[step] = _entity(entity)
    return {"name": job.name, "groups": groups, "names": list(job.feature_names), "steps": steps}


def _begin(job: Job) -> Description:
    return {} if job.warm_start is None else {"warm_start": job.warm_start.name}


def _label(job: Job) -> Description:
    label = job.label
    how = {"kind": label.kind, "field": label.field, "on": label.on, "at": label.at, "by": label.by}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in how.items()} | {
        "after": label.after,
        "revisions": label.revisions,
    }


def _entity(entity: Entity) -> Description:
    names = iter(entity.feature_names)
    return {
        "key": list(entity.key),
        "of": entity.of,
        "where": None if entity.where is None else declared_text(entity.where),
        "ttl": entity.ttl_us,
        "features": {
            next(names): f"{declared_text(each)} over {declared_text(over)}"
            for each in entity.aggregates
            for over in entity.over
        },
        "aggregates": {each.stem: declared_text(each) for each in entity.aggregates},
        "windows": {over.label or "lifetime": declared_text(over) for over in entity.over},
    }


def declared_text(value: Any) -> str:
    """A declared object as text: equal exactly where it is declared alike, in every process.

    Spelled out, because river shows a metric or statistic by its figure, and numbers rounded. Functions show where they
    lie in memory, which says nothing about them.
    """
    if isinstance(value, compose.Pipeline):
        return f"({' | '.join(map(declared_text, value.steps.values()))})"
    if isinstance(value, compose.TransformerUnion):
        return f"({' + '.join(map(declared_text, value.transformers.values()))})"
    if isinstance(value, utils.Rolling):
        return f"Rolling({declared_text(value.obj)}, window_size={value.window.maxlen})"
    if isinstance(value, BaseModel):
        return _call(value, {name: getattr(value, name) for name in type(value).model_fields})
    if isinstance(value, base.Base):
        try:
            return _call(value, {name: getattr(value, name, given) for name, given in value._get_params().items()})
        except AttributeError:  # a class of the user's that does not keep its parameters
            return type(value).__qualname__
    if isinstance(value, dict):
        return f"{{{', '.join(f'{declared_text(key)}: {declared_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(declared_text, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(declared_text, value)))}}}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _call(value: Any, parameters: dict[str, Any]) -> str:
    given = parameters.pop("_POSITIONAL_ARGS", ())  # where river has `*args`, as a set in places
    positional = [declared_text(each) for each in given]
    if isinstance(given, set | frozenset):
        positional.sort()
    named = [f"{name}={declared_text(each)}" for name, each in parameters.items()]
    return f"{type(value).__name__}({', '.join(positional + named)})"


def compare(before: Description, now: Description, reset: Collection[str] = ()) -> list[Change]:
    """What the differences between two descriptions do to the state; empty where there are none.

    `reset` names the steps that may begin anew.
    """
    changes = _changed("job", {n: before[n] for n in ("name", "groups")}, {n: now[n] for n in ("name", "groups")})
    old, new = before["steps"], now["steps"]
    changes += _changed("read", old["read"], new["read"])
    changes += _changed("admit", old["admit"], new["admit"])
    changes += _compare_learner(old["learner"], new["learner"], reset)
    changes += _compare_metrics(old["publish"]["metrics"], new["publish"]["metrics"], reset)
    changes += _compare_features(old, new, reset)
    if not changes and before["names"] != now["names"]:
        same = sorted(before["names"]) == sorted(now["names"])
        text = (
            "their order changed, their state stays" if same else "those of the event alone changed; they have no state"
        )
        changes.append(Change("features", text))
    return changes


def _changed(step: str, old: Description, new: Description) -> list[Change]:
    """The differences of what cannot be changed: the whole state depends on it, so no step could begin anew alone."""
    return [
        Change(step, f"{name} was {old[name]!r} and is {new[name]!r}", True)
        for name in new
        if old.get(name) != new[name]
    ]


def _compare_learner(old: Description, new: Description, reset: Collection[str]) -> list[Change]:
    if old == new:
        return []
    unlike = [name for name in old | new if old.get(name) != new.get(name)]
    what = "; ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in unlike)
    if "learner" in reset:
        stay = "stay" if old["per"] == new["per"] else "stay to be scored, and no model learns from them"
        return [Change("learner", f"the models begin anew, open questions {stay} ({what})")]
    return [Change("learner", what, True)]


def _compare_metrics(old: Description, new: Description, reset: Collection[str]) -> list[Change]:
    changes = [Change("publish", f"metric {name} is new and starts empty") for name in new if name not in old]
    changes += [Change("publish", f"metric {name} is gone and dropped") for name in old if name not in new]
    for name in new:
        if name in old and old[name] != new[name]:
            text = f"metric {name} was {old[name]} and is {new[name]}"
            begins = f"metric {name} begins anew ({text})"
            changes.append(Change("publish", begins) if "publish" in reset else Change("publish", text, True))
    return changes


def _compare_features(old: Description, new: Description, reset: Collection[str]) -> list[Change]:
    changes: list[Change] = []
    gone = [step for step in old if step.startswith("features_") and step not in new]
    come = [step for step in new if step.startswith("features_") and step not in old]
    for step in come:  # --reset says that it is no renaming
        if gone and step not in reset:
            text = f"step {gone[0]} is gone and this one is new: if it was renamed, its state would be lost"
            changes.append(Change(step, text, True))
        else:
            changes.append(Change(step, f"{', '.join(new[step]['features'])}: new, starts empty"))
    changes += [Change(step, f"{', '.join(old[step]['features'])}: gone, dropped") for step in gone]
    for step in new:
        if step.startswith("features_") and step in old and old[step] != new[step]:
            changes += _compare_entity(step, old[step], new[step], reset)
    return changes


def _compare_entity(step: str, old: Description, new: Description, reset: Collection[str]) -> list[Change]:
    fixed = [name for name in ("key", "of", "where", "ttl") if old[name] != new[name]]
    reasons = [f"{name} was {old[name]!r} and is {new[name]!r}" for name in fixed]
    for what in ("aggregates", "windows"):
        both = old[what].keys() & new[what].keys()
        reasons += [f"{old[what][n]} is {new[what][n]} now" for n in sorted(both) if old[what][n] != new[what][n]]
    left, came = old["windows"].keys() - new["windows"].keys(), new["windows"].keys() - old["windows"].keys()
    if left and came:
        reasons.append(f"window {', '.join(sorted(left))} is {', '.join(sorted(came))} now")
    if step in reset:
        return [Change(step, f"begins anew ({'; '.join(reasons) or 'as asked'})")]
    if reasons:
        return [Change(step, reason, True) for reason in reasons]
    changes = [
        Change(step, f"{name} is new and starts empty") for name in new["features"] if name not in old["features"]
    ]
    changes += [Change(step, f"{name} is gone and dropped") for name in old["features"] if name not in new["features"]]
    return changes or [Change(step, "the order of the features changed; their state stays")]


def unchanged(before: Description, now: Description, reset: Collection[str]) -> list[str]:
    """The steps to reset that are declared as they were. They go on as they are.

    So a command line that is used again, as a supervisor does, throws no state away a second time.
    """
    return [step for step in reset if before["steps"].get(step) == now["steps"].get(step)]


def first_layout(job: Job) -> Layout:
    """How the state of a new job lies: every feature step in one part."""
    return Layout(features={step: (_part(step, entity, ()),) for step, entity in _feature_steps(job)})


def next_layout(layout: Layout, before: Description, job: Job, now: Description, reset: Collection[str]) -> Layout:
    """How state lies after a change that `compare` did not refuse.

    What begins anew gets rows of a name that was never used, so that nothing old is found there.
    """
    used = {*layout.dropped, *(part.rows for parts in layout.features.values() for part in parts)}
    anew = set(reset) - set(unchanged(before, now, reset))
    features: dict[str, tuple[FeaturePart, ...]] = {}
    for step, entity in _feature_steps(job):
        old = () if step in anew else layout.features.get(step, ())
        features[step] = _next_parts(step, entity, old, used)
    kept = {part.rows for parts in features.values() for part in parts}
    metrics = dict(layout.metrics)
    old_metrics, new_metrics = before["steps"]["publish"]["metrics"], now["steps"]["publish"]["metrics"]
    for name, text in old_metrics.items():
        if name not in new_metrics or (new_metrics[name] != text and "publish" in reset):
            metrics[name] = metrics.get(name, 1) + 1
    return Layout(
        features=features,
        dropped=tuple(sorted(used - kept)),
        models=layout.models + ("learner" in anew),
        metrics=metrics,
    )


def expiry(job: Job, layout: Layout) -> dict[str, int]:
    """By the name of rows, how long (µs) after its last event an entity equals one never seen, where it ever does."""
    lateness = job.time.lateness if job.time.order == "arrival" else 0
    parts = [part for parts in layout.features.values() for part in parts]
    after = {part.rows: declared(part, job).forget_after_us for part in parts}
    return {rows: span + lateness for rows, span in after.items() if span is not None}


def declared(part: FeaturePart, job: Job) -> Entity:
    """The declaration that a part was made for; it may hold statistics of the job's own.

    Where features of the part are gone, their statistics may be too: `Gone` stands for these. Raises `StateError` where
    one is missing of which features are still declared.
    """
    pickled, allowed = base64.b64decode(part.declaration), names_of(job)
    lost = lost_names(pickled, allowed)
    entity: Entity = safe_loads(pickled, allowed, lost)
    if lost:
        kept = _only(entity, part.names)
        if not set(part.names) <= set(kept.feature_names) or _GONE in names_in(kept.aggregates):
            raise StateError(
                f"the state of {', '.join(part.names)} was made with {', '.join(map('.'.join, sorted(lost)))}, which "
                "the job does not have. Hint: was a class renamed or moved? Put it back, or have a run without these "
                "features: they can be added anew then"
            )
    return entity


def gone_names(layout: Layout, job: Job) -> frozenset[Name]:
    """What state of features may name that the job does not have any more, as the features are gone."""
    allowed = names_of(job)
    parts = [part for parts in layout.features.values() for part in parts]
    return frozenset().union(*(lost_names(base64.b64decode(part.declaration), allowed) for part in parts))


def _next_parts(step: str, entity: Entity, old: tuple[FeaturePart, ...], used: set[str]) -> tuple[FeaturePart, ...]:
    wanted = entity.feature_names
    parts = [part.model_copy(update={"names": tuple(n for n in part.names if n in wanted)}) for part in old]
    parts = [part for part in parts if part.names]
    there = {name for part in parts for name in part.names}
    added = tuple(name for name in wanted if name not in there)
    if added:
        parts.append(_part(step, _only(entity, added), used, added))
    return tuple(parts)


def _only(entity: Entity, names: Collection[str]) -> Entity:
    """The declaration with the aggregates and windows that some features need."""
    pairs = [(each, over) for each in entity.aggregates for over in entity.over]
    some = [pair for pair, name in zip(pairs, entity.feature_names, strict=True) if name in names]
    aggregates = tuple(each for each in entity.aggregates if any(each is one for one, _ in some))
    over = tuple(each for each in entity.over if any(each is one for _, one in some))
    return entity.model_copy(update={"aggregates": aggregates, "over": over})


def _part(step: str, entity: Entity, used: Collection[str], names: tuple[str, ...] | None = None) -> FeaturePart:
    options = (step, *(f"{step}.{number}" for number in range(2, len(used) + 3)))
    rows = next(option for option in options if option not in used)
    # Which events are observed is decided before; a function would only be in the way of pickling.
    pickled = pickle.dumps(entity.model_copy(update={"where": None}), 5)
    return FeaturePart(rows=rows, names=names or entity.feature_names, declaration=base64.b64encode(pickled).decode())


def _feature_steps(job: Job) -> list[tuple[str, Entity]]:
    return [(f"features_{name}", entity) for name, entity in zip(entity_step_names(job), job.entities, strict=True)]
