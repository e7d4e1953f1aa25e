"""Audit: predictions of the past made again from the examples that taught the model, and compared bit for bit.

`Auditor` opens the learn logs of a run, and `dataflows.relearn` carries out again what it has to. A log that was
changed, even with its checksums made anew, does not give the same figures any more: the first that differs says where.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from dataflows.checkpoints import Checkpoints, Manifest
from dataflows.connectors.files import Jsonl
from dataflows.events import EventId, Outcome, Prediction, to_datetime
from dataflows.findings import Findings, Trail, of_keyframe
from dataflows.job import Job, final_step
from dataflows.learner import method_of, model_named
from dataflows.learnlog import ASKED, FAILED, PROTOTYPE
from dataflows.learnstore import Frame, LearnReader, open_logs
from dataflows.likeness import first_difference
from dataflows.pickles import names_of
from dataflows.provenance import differences, provenance
from dataflows.published import Asked, Published
from dataflows.query import ModelState, PastState
from dataflows.relearn import (
    END,
    UNKNOWN,
    Beginning,
    Broken,
    Passed,
    Place,
    Reached,
    Relearning,
    Said,
    Segment,
    Target,
    Taught,
    beginnings,
    segments,
)
from dataflows.settings import RunDirectory, Start, output_sinks, read_branches
from dataflows.startup import read_job
from dataflows.state import StateError, Version
from features.rows import key_of, key_text

_STEP = 10_000
"""Predictions between two reports of progress."""


class Remade(NamedTuple):
    """One prediction of the past: what it was made of, and what it is when made again.

    `keyframe` is how many examples the model had learned where relearning began, `last` the example it learned last
    before (None where it is the keyframe's), `changed` what is not as it was of code, libraries and machine.
    """

    id: EventId
    batch: Version
    time: int
    features: dict[str, Any]
    model: str
    version: int
    logged: Any
    output: Any
    equal: bool
    keyframe: int
    relearned: int
    last: Taught | None
    changed: list[str]


class Auditor:
    """Makes the predictions of a run again.

    Parameters
    ----------
    job, run
        The job, and where its run lies; it may go on meanwhile.
    branch
        Which branch's predictions; None: the one that goes on.

    Raises `StateError` where there is no learn log.
    """

    def __init__(self, job: Job, run: RunDirectory, branch: int | None = None) -> None:
        self._job = job
        self._run = run
        self._branch = _branch(run, branch)
        self.lineage = self._branch.lineage.on_from_here()
        # Before the logs: what it holds is in them.
        self._manifest = self._newest_checkpoint()
        self._kinds: dict[int, _Kind] = {}
        self._logs = open_logs(run, self.lineage, names_of(job))
        self._now = provenance(job, int(read_job(run)["groups"]) if run.job.exists() else 16)

    def close(self) -> None:
        """Give the logs up."""
        for log in self._logs:
            log.close()

    @property
    def logs(self) -> list[LearnReader]:
        """The learn logs, one for each key group of models."""
        return self._logs

    # -- one prediction

    def remake(self, id: EventId) -> Remade:
        """Make one prediction again. Raises `StateError` where the log does not have it."""
        log, target = self._find(id)
        segment = self._segment(log, target, id)
        again = Relearning(log, [segment])
        last: Taught | None = None
        said: Said | None = None
        broken: Broken | None = None
        for step in again.run():
            if isinstance(step, Taught) and step.learned:
                last = step
            elif isinstance(step, Said) and step.place == (target.end[0], target.end[1] - 1):
                said = step
            elif isinstance(step, Broken):
                broken = step
        if broken is not None or said is None or said.version != said.examples:
            self._refuse_unkept(log, target, id)
        if broken is not None:
            raise StateError(f"the learn log {log.path}, batch {Version.of(broken.place[0])}: {broken.text}")
        if said is None:
            raise StateError(f"the model failed when it was asked {id!r}, then as now: there is no prediction")
        changed = self._changed(log, again.makers)
        return Remade(
            said.id, Version.of(said.place[0]), said.time, said.features,
            self._model_name(said.frame, said.key), said.version,
            None if said.logged is UNKNOWN else self.shown(said.logged, said.frame.begun),
            self.shown(said.output, said.frame.begun),
            said.equal and said.logged is not UNKNOWN, segment.frame.examples, said.relearned, last, changed,
        )  # fmt: skip

    def _segment(self, log: LearnReader, target: Target, id: EventId) -> Segment:
        try:
            [segment] = segments(log, [target])
        except StateError:
            self._refuse_unkept(log, target, id)
            raise
        return segment

    def _refuse_unkept(self, log: LearnReader, target: Target, id: EventId) -> None:
        begin = beginnings(log).get((target.begun, target.key))
        if begin is None or not begin.reaches(target.end):
            raise StateError(
                f"{id!r} cannot be made again: what taught its model before is not kept. "
                "Hint: Audit(keep=...) says how long it is"
            )

    def _find(self, id: EventId) -> tuple[LearnReader, Target]:
        """The newest question with this id."""
        found: list[tuple[int, LearnReader, Target]] = []
        for log in self._logs:
            begun = {head.version: head.begun for head in log.heads}
            for version in log.holding(id):
                _, entries = log.entries(version)
                for place in range(len(entries) - 1, -1, -1):
                    entry = entries[place]
                    if entry[0] == ASKED and type(entry[3]) is type(id) and entry[3] == id:
                        target = Target((version, place + 1), key_text(entry[2]), begun[version])
                        found.append((entry[1], log, target))
                        break
                else:
                    continue  # another id with the same checksum
                break
        if found:
            _, log, target = max(found, key=lambda each: each[0])
            return log, target
        raise StateError(
            f"no prediction of event {id!r} is in the learn log of branch {self._branch.branch}. Hint: is it older "
            "than Audit(keep=...), was it rejected, or asked on another branch (--branch)?"
        )

    # -- many

    def check(
        self, sample: int | None = None, seed: int = 0, show: Callable[[Findings], None] = lambda found: None
    ) -> Findings:
        """Make many predictions again and compare all there is to compare: `sample` of them drawn at random, or all."""
        found = Findings()
        published = Published(self)
        checkpoint = _Checkpoint(self._job, self._run, self._manifest, self.begun_at(self._manifest))
        try:
            for log, chosen in zip(self._logs, self._chosen(sample, seed), strict=True):
                if chosen is None or chosen:
                    self._check_log(log, chosen, found, checkpoint, published, show)
        finally:
            checkpoint.close()
        published.compare(found, whole=sample is None and not found.unkept and not found.broken)
        found.changed = list(dict.fromkeys(found.changed))
        return found

    def _chosen(self, sample: int | None, seed: int) -> list[set[int] | None]:
        """By log: which of its questions, counted from its beginning; None for all."""
        if sample is None:
            return [None] * len(self._logs)
        totals = [sum(head.asked for head in log.heads) for log in self._logs]
        ends = list(accumulate(totals))
        drawn = random.Random(seed).sample(range(ends[-1]), min(sample, ends[-1]))
        chosen: list[set[int] | None] = [set() for _ in self._logs]
        for number in drawn:
            index = bisect_right(ends, number)
            its = chosen[index]
            assert its is not None
            its.add(number - (ends[index] - totals[index]))
        return chosen

    def _check_log(
        self, log: LearnReader, chosen: set[int] | None, found: Findings, checkpoint: _Checkpoint,
        published: Published, show: Callable[[Findings], None],
    ) -> None:  # fmt: skip
        begin = beginnings(log)
        self._check_beginning(log, found)
        parts, places = self._parts(log, chosen, begin, checkpoint, found)
        again = Relearning(log, parts, checkpoint.version)
        trails: dict[tuple[int, str], Trail] = {}
        relearned = found.relearned
        published.begin_log()
        for step in again.run():
            if isinstance(step, Reached):
                for key, unlike in checkpoint.compare(again, found):
                    trails.setdefault((checkpoint.begun, key), Trail(found)).reached(unlike)
                continue
            trail = trails.setdefault((step.frame.begun, step.key), Trail(found))
            if isinstance(step, Said):
                self._said(step, places is None or step.place in places, found)
                if trail.said(step):
                    published.said(step)
                else:
                    published.leave(step)
                if found.compared % _STEP == 0:
                    show(found)
            elif isinstance(step, Taught):
                trail.taught(step)
                published.taught(step)
            elif isinstance(step, Broken):
                found.broken += 1
                trail.broken(step)
            else:
                found.keyframes += 1
                found.keyframes_equal += step.difference is None
                if trail.passed(step):
                    again.adopt(step)
            found.relearned = relearned + again.relearned
        for trail in trails.values():
            trail.end()
        self._doubt(log, trails.values(), begin, found)
        found.changed += self._changed(log, again.makers)

    def _said(self, said: Said, is_asked: bool, found: Findings) -> None:
        found.compared += 1
        found.asked += is_asked
        if said.logged is UNKNOWN:
            found.unknown += is_asked and said.equal
            if is_asked:
                found.outputs.append((said.id, self.shown(said.output, said.frame.begun)))
        elif said.equal:
            found.compared_equal += 1
            found.equal += is_asked

    def _check_beginning(self, log: LearnReader, found: Findings) -> None:
        """Where all is kept for ever, the chunk with which the log begins is there."""
        if self._job.audit is None or self._job.audit.keep is not None:
            return
        held = {head.version for head in log.heads}
        for frame in log.frames():
            if frame.key == PROTOTYPE and frame.version not in held:
                found.note(frame.version, None, f"the chunk with which {log.path} begins is not there any more")

    def _parts(
        self, log: LearnReader, chosen: set[int] | None, begin: dict[tuple[int, str], Beginning],
        checkpoint: _Checkpoint, found: Findings,
    ) -> tuple[list[Segment], set[Place] | None]:  # fmt: skip
        """What has to be carried out again; and which questions were chosen (None: all)."""
        if chosen is None:
            found.unkept += sum(each.before for each in begin.values())
            return [Segment(key, each.frame, END) for (_, key), each in begin.items() if each.frame is not None], None
        targets = []
        for target in self._chosen_targets(log, chosen):
            if begin[target.begun, target.key].reaches(target.end):
                targets.append(target)
            else:
                found.unkept += 1
        places = {(target.end[0], target.end[1] - 1) for target in targets}
        models = {(target.begun, target.key) for target in targets}
        targets += [
            target for target in checkpoint.targets(models) if begin[target.begun, target.key].reaches(target.end)
        ]
        return segments(log, targets, to_keyframes=True), places

    def _chosen_targets(self, log: LearnReader, chosen: set[int]) -> Iterator[Target]:
        before = 0
        for head in log.heads:
            mine = {number - before for number in chosen if before <= number < before + head.asked}
            before += head.asked
            if not mine:
                continue
            entries = log.entries(head.version)[1]
            asked = [place for place, entry in enumerate(entries) if entry[0] == ASKED]
            for place in (asked[number] for number in mine):
                if entries[place][-1] != FAILED:
                    yield Target((head.version, place + 1), key_text(entries[place][2]), head.begun)

    def _doubt(
        self, log: LearnReader, trails: Iterable[Trail], begin: dict[tuple[int, str], Beginning], found: Findings
    ) -> None:
        """Where a part was wrong from its keyframe on, that may be wrong: make it again from the one before."""
        doubted = {frame for trail in trails for frame in trail.doubted - trail.seen}
        for frame in sorted(doubted):
            end = (frame.version, frame.place)
            beginning = begin.get((frame.begun, frame.key))
            if frame.key == PROTOTYPE or beginning is None or not beginning.reaches(end):
                continue
            before = segments(log, [Target(end, frame.key, frame.begun)], to_keyframes=True)
            for step in Relearning(log, before).run():
                if isinstance(step, Passed) and step.frame == frame and step.difference is not None:
                    found.note(frame.version, None, of_keyframe(step))

    # -- for both

    def shown(self, output: Any, begun: int) -> Any:
        """What a model said as records have it: of two classes the probability of True."""
        if isinstance(output, dict) and self._kind(begun).shows_probability:
            return output.get(True, 0.0)
        return output

    def _model_name(self, frame: Frame, key: str) -> str:
        kind = self._kind(frame.begun)
        return model_named(kind.name, kind.per, key_of(key))

    def _kind(self, begun: int) -> _Kind:
        """What the models were when they were begun so often: the job may declare others now."""
        if begun not in self._kinds:
            model, per = self._job.model, self._job.per
            for log in self._logs:
                for frame in log.frames():
                    if frame.key == PROTOTYPE and frame.begun == begun:
                        model = log.model(frame)
            on_the_way = {number >> 40 for _, number in self.lineage.ranges}
            for start in read_branches(self._run):
                if start.branch in on_the_way and start.layout.models == begun and start.job:
                    per = tuple(start.job["steps"]["learner"]["per"]) or None
            shows = self._job.binary and method_of(model)[1]
            self._kinds[begun] = _Kind(type(final_step(model)).__name__, per, shows)
        return self._kinds[begun]

    def prediction(self, said: Said) -> Prediction:
        """The record of a prediction that was made again."""
        name, at = self._model_name(said.frame, said.key), to_datetime(said.time)
        output = self.shown(said.output, said.frame.begun)
        return Prediction(said.id, at, said.features, output, name, said.examples, said.late)

    def outcome(self, said: Asked, taught: Taught) -> Outcome:
        """The record of an outcome: what was said, and what was learned."""
        return Outcome(
            taught.id, to_datetime(said.time), said.shown, taught.label, to_datetime(taught.moment),
            self._model_name(taught.frame, taught.key), said.examples, taught.examples, taught.assumed,
        )  # fmt: skip

    def published(self) -> Iterator[tuple[str, Path]]:
        """The outputs that are files, by kind of record; those of a branch that was left are kept aside."""
        for kind, sink in output_sinks(self._job, self._run.path).items():
            if isinstance(sink, Jsonl) and kind in ("predictions", "outcomes"):
                aside = self._run.aside(self._branch.branch) / f"{kind}.jsonl"
                path = sink.path if self.is_newest else aside
                if path.exists():
                    yield kind, path

    @property
    def is_newest(self) -> bool:
        """Whether the outputs are those of this branch."""
        return self._branch.branch == read_branches(self._run)[-1].branch

    def _newest_checkpoint(self) -> Manifest | None:
        if not self._run.groups.exists():
            return None
        fitting = [m for m in Checkpoints(self._run).all() if self.lineage.holds(m.version.number)]
        return fitting[-1] if fitting else None

    def begun_at(self, manifest: Manifest | None) -> int:
        """How often the models had been begun at a checkpoint."""
        layouts = {start.branch: start.layout for start in read_branches(self._run)}
        return 1 if manifest is None else layouts[manifest.branch].models

    def _changed(self, log: LearnReader, makers: set[int]) -> list[str]:
        found: dict[str, None] = {}
        for maker in sorted(makers):
            found |= dict.fromkeys(differences(log.makers.get(maker, {}), self._now))
        return list(found)


class _Kind(NamedTuple):
    """What the models are: their name, what there is one for each of, and whether records show a probability."""

    name: str
    per: tuple[str, ...] | None
    shows_probability: bool


def _branch(run: RunDirectory, number: int | None) -> Start:
    branches = read_branches(run)
    if number is None:
        return branches[-1]
    for start in branches:
        if start.branch == number:
            return start
    raise StateError(f"there is no branch {number}. Hint: there are {', '.join(str(b.branch) for b in branches)}")


class _Checkpoint:
    """The models of the newest checkpoint, to be compared with those that were learned again."""

    def __init__(self, job: Job, run: RunDirectory, manifest: Manifest | None, begun: int) -> None:
        self.begun = begun
        self._past: PastState | None = None
        self._fault: str | None = None
        self._kept: dict[str, ModelState] | None = None
        if manifest is not None:
            try:
                self._past = PastState(job, run, manifest)
            except StateError as error:
                # A run that goes on drops what is old: then there is nothing to compare.
                if manifest.version in {m.version for m in Checkpoints(run).all()}:
                    self._fault = str(error)
        self._version = None if manifest is None else manifest.version

    def close(self) -> None:
        """Give the state up."""
        if self._past is not None:
            self._past.close()

    @property
    def version(self) -> int | None:
        """The version, as a number, up to which models have to be learned again; None: there is none to compare."""
        return None if self._version is None else self._version.number

    def targets(self, models: set[tuple[int, str]]) -> list[Target]:
        """How far these models have to be learned again."""
        if self._version is None:
            return []
        end = (self._version.number + 1, 0)
        return [Target(end, key, begun) for begun, key in sorted(models) if begun == self.begun]

    def compare(self, again: Relearning, found: Findings) -> Iterator[tuple[str, str | None]]:
        """Compare what the state store holds: keys of models, and where they differ."""
        kept = self._models(found)
        if kept is None or self._version is None:
            return
        found.checkpoint = str(self._version)
        for key, (model, examples, is_used) in again.models(self.begun).items():
            state = kept.get(key)
            if state is None and not is_used:
                continue
            if state is None:
                unlike: str | None = "it is not there"
            elif examples != state.version:
                unlike = f"it has learned {state.version:,} examples, and {examples:,} were found"
            else:
                unlike = first_difference(model, state.model, "model")
            found.models += 1
            found.models_equal += unlike is None
            if unlike is not None:
                of = "" if key == "null" else f" of {key_of(key)!r}"
                text = f"the model{of} in checkpoint {self._version} is not what was learned: {unlike}"
                found.note(self._version.number, None, text)
            yield key, unlike

    def _models(self, found: Findings) -> dict[str, ModelState] | None:
        if self._kept is None and self._past is not None:
            try:
                self._kept = {key_text(key): state for key, state in self._past.models().items()}
            except StateError as error:
                self._fault, self._past = str(error), None
        if self._fault is not None and self._version is not None:
            found.note(self._version.number, None, self._fault)
            self._fault = None
        return self._kept
