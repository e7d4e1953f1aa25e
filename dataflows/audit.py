"""Audit: predictions of the past made again from the examples that taught the model, and compared bit for bit.

`Auditor` opens the learn logs of a run, and `dataflows.relearn` carries out again what it has to. A log that was
changed, even with its checksums made anew, does not give the same figures any more: the first that differs says where.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from dataflows.checkpoints import Checkpoints
from dataflows.connectors.files import Jsonl
from dataflows.events import EventId, Outcome, Prediction, encode, to_datetime
from dataflows.job import Job
from dataflows.learner import method_of, model_named
from dataflows.learnlog import ASKED, FAILED, PROTOTYPE
from dataflows.learnstore import Frame, LearnReader
from dataflows.likeness import first_difference
from dataflows.pickles import names_of
from dataflows.provenance import differences, provenance
from dataflows.query import PastState
from dataflows.relearn import (
    END,
    UNKNOWN,
    Passed,
    Place,
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
from dataflows.state import Lineage, StateError, Version
from features.rows import key_of, key_text

FINDINGS = 20
"""Of more things that are wrong only the count is kept."""

SUSPECTS = 5
"""Examples that are named as possibly changed."""

PUBLISHED = 2_000_000
"""Records that are compared with the outputs at the most; their checksums are held in memory."""

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


class Wrong(NamedTuple):
    """Something that is not as it was: where, of which prediction (None: of no single one), and what."""

    batch: Version
    id: EventId | None
    text: str


@dataclass
class Findings:
    """What a check of many predictions found.

    `asked` were to be made again, `compared` are all that were, those on the way among them; `unknown` are those of
    which the log does not have what was said, `unkept` those that were not asked for because what taught their model
    is not kept any more. `published` counts records of the outputs, by kind, that were compared too.
    """

    asked: int = 0
    equal: int = 0
    compared: int = 0
    compared_equal: int = 0
    unknown: int = 0
    unkept: int = 0
    relearned: int = 0
    keyframes: int = 0
    keyframes_equal: int = 0
    models: int = 0
    models_equal: int = 0
    checkpoint: str | None = None
    published: dict[str, int] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    wrong_in_all: int = 0
    changed: list[str] = field(default_factory=list)
    outputs: dict[Any, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether everything is as it was."""
        return not self.wrong_in_all and self.equal + self.unknown >= self.asked

    def note(self, batch: int, id: EventId | None, text: str) -> None:
        """Something is wrong."""
        self.wrong_in_all += 1
        if len(self.wrong) < FINDINGS:
            self.wrong.append(Wrong(Version.of(batch), id, text))


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
        way = Lineage([Version(*fork) for fork in self._branch.forks], Version(self._branch.branch, 0))
        self.lineage = way.on_from_here()
        paths = sorted(run.learned.glob("*.sqlite3"))
        if not paths:
            raise StateError(f"{run.learned} holds no learn log. Hint: was the job run with audit=None?")
        allowed = names_of(job)
        self._logs: list[LearnReader] = []
        try:
            for path in paths:
                self._logs.append(LearnReader(path, self.lineage, allowed))
        except BaseException:
            self.close()
            raise
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
        [segment] = segments(log, [target])
        again = Relearning(log, [segment])
        last: Taught | None = None
        said: Said | None = None
        for step in again.run():
            if type(step) is Taught:
                last = step
            elif type(step) is Said:
                said = step
        if said is None or said.id != id:
            raise StateError(f"the model failed when it was asked {id!r}, then as now: there is no prediction")
        if segment.frame.key == PROTOTYPE and said.version > said.examples and log.is_cut:
            raise StateError(
                f"{id!r} cannot be made again: its model had learned from {said.version:,} examples, of which the "
                f"learn log keeps {said.examples:,}, and no keyframe of it. Hint: Audit(keep=...) says "
                "how long"
            )
        changed = self._changed(log, again.makers)
        return Remade(
            said.id, Version.of(said.place[0]), said.time, said.features, self._model_name(said.key), said.version,
            None if said.logged is UNKNOWN else self.shown(said.logged), self.shown(said.output),
            said.equal and said.logged is not UNKNOWN, segment.frame.examples, said.relearned, last, changed,
        )  # fmt: skip

    def _find(self, id: EventId) -> tuple[LearnReader, Target]:
        for log in self._logs:
            begun = {head.version: head.begun for head in log.heads}
            for version in log.holding(id):
                _, entries = log.entries(version)
                for place in range(len(entries) - 1, -1, -1):
                    entry = entries[place]
                    if entry[0] == ASKED and type(entry[3]) is type(id) and entry[3] == id:
                        return log, Target((version, place + 1), key_text(entry[2]), begun[version])
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
        published = _Published(self)
        for log, chosen in zip(self._logs, self._chosen(sample, seed), strict=True):
            if chosen is not None and not chosen:
                continue
            self._check_log(log, chosen, found, published, show)
        published.compare(found)
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
        self, log: LearnReader, chosen: set[int] | None, found: Findings, published: _Published,
        show: Callable[[Findings], None],
    ) -> None:  # fmt: skip
        checkpoint = _Checkpoint(self._job, self._run, self.lineage)
        parts, places = self._parts(log, chosen, checkpoint, found)
        again = Relearning(log, parts)
        trails: dict[str, _Trail] = {}
        for step in again.run():
            trail = trails.setdefault(step.key, _Trail(found))
            if isinstance(step, Said):
                found.compared += 1
                is_asked = places is None or step.place in places
                found.asked += is_asked
                if step.logged is UNKNOWN:
                    found.unknown += is_asked
                    if is_asked:
                        found.outputs[step.id] = self.shown(step.output)
                elif step.equal:
                    found.compared_equal += 1
                    found.equal += is_asked
                trail.said(step)
                published.said(step)
                if found.compared % _STEP == 0:
                    show(found)
            elif isinstance(step, Taught):
                found.relearned += 1
                trail.taught(step)
                published.taught(step)
            else:
                found.keyframes += 1
                found.keyframes_equal += step.difference is None
                trail.passed(step)
        for trail in trails.values():
            trail.end()
        self._doubt(log, trails, found)
        checkpoint.compare(again, found)
        found.changed += self._changed(log, again.makers)

    def _parts(
        self, log: LearnReader, chosen: set[int] | None, checkpoint: _Checkpoint, found: Findings
    ) -> tuple[list[Segment], set[Place] | None]:
        """What has to be carried out again; and which questions were chosen (None: all)."""
        begin, before = beginnings(log) if chosen is None or log.is_cut else ({}, 0)
        if chosen is None:
            checkpoint.note_keys({key for _, key in begin})
            found.unkept += before
            return [Segment(key, frame, END) for (_, key), frame in begin.items() if frame is not None], None
        targets = []
        for target in self._chosen_targets(log, chosen):
            first = begin.get((target.begun, target.key))
            if begin and (first is None or target.end <= (first.version, first.place)):
                found.unkept += 1
            else:
                targets.append(target)
        checkpoint.note_keys({target.key for target in targets})
        places = {(target.end[0], target.end[1] - 1) for target in targets}
        return segments(log, targets + checkpoint.targets(), to_keyframes=True), places

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

    def _doubt(self, log: LearnReader, trails: dict[str, _Trail], found: Findings) -> None:
        """Where a part was wrong from its keyframe on, that may be wrong: make it again from the one before."""
        doubted = {frame for trail in trails.values() for frame in trail.doubted - trail.seen}
        for frame in sorted(doubted):
            if frame.key == PROTOTYPE:
                continue
            before = segments(log, [Target((frame.version, frame.place), frame.key, frame.begun)], to_keyframes=True)
            for step in Relearning(log, before).run():
                if type(step) is Passed and step.frame == frame and step.difference is not None:
                    found.note(frame.version, None, _of_keyframe(step))

    # -- for both

    def shown(self, output: Any) -> Any:
        """What a model said as records have it: of two classes the probability of True."""
        if self._job.binary and method_of(self._job.model)[1] and isinstance(output, dict):
            return output.get(True, 0.0)
        return output

    def _model_name(self, key: str) -> str:
        return model_named(self._job.model_name, self._job.per, key_of(key))

    def prediction(self, said: Said) -> Prediction:
        """The record of a prediction that was made again."""
        name, at = self._model_name(said.key), to_datetime(said.time)
        return Prediction(said.id, at, said.features, self.shown(said.output), name, said.examples, said.late)

    def outcome(self, said: tuple[int, Any, int], taught: Taught) -> Outcome:
        """The record of an outcome: when it was asked, what was said after how many examples; and what was learned."""
        time, output, version = said
        return Outcome(
            taught.id, to_datetime(time), self.shown(output), taught.label, to_datetime(taught.moment),
            self._model_name(taught.key), version, taught.examples, taught.assumed,
        )  # fmt: skip

    def published(self) -> Iterator[tuple[str, Path]]:
        """The outputs that are files, by kind of record."""
        for kind, sink in output_sinks(self._job, self._run.path).items():
            if isinstance(sink, Jsonl) and sink.path.exists() and kind in ("predictions", "outcomes"):
                yield kind, sink.path

    @property
    def is_newest(self) -> bool:
        """Whether the outputs are those of this branch."""
        return self._branch.branch == read_branches(self._run)[-1].branch

    def _changed(self, log: LearnReader, makers: set[int]) -> list[str]:
        found: dict[str, None] = {}
        for maker in sorted(makers):
            found |= dict.fromkeys(differences(log.makers.get(maker, {}), self._now))
        return list(found)


def _branch(run: RunDirectory, number: int | None) -> Start:
    branches = read_branches(run)
    if number is None:
        return branches[-1]
    for start in branches:
        if start.branch == number:
            return start
    raise StateError(f"there is no branch {number}. Hint: there are {', '.join(str(b.branch) for b in branches)}")


def _of_keyframe(step: Passed) -> str:
    return f"the keyframe of {step.frame.examples:,} examples is not what they give: {step.difference}"


class _Trail:
    """Follows one model along its log, to say where things began to be wrong."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._equal: Said | None = None  # the last one that was
        self._wrong: Said | None = None  # the one before was wrong, and it is not clear yet why
        self._is_wrong = False
        self._suspects: list[Taught] = []
        self._learned = 0
        self.doubted: set[Frame] = set()
        self.seen: set[Frame] = set()

    def said(self, said: Said) -> None:
        """Take a prediction that was made again."""
        if said.equal:
            if self._wrong is not None:
                self._explain(self._wrong, alone=True)
            self._wrong, self._is_wrong, self._equal = None, False, said
            self._suspects, self._learned = [], 0
        elif self._wrong is not None:
            self._explain(self._wrong, alone=False)
            self._wrong = None
        elif not self._is_wrong:
            self._wrong, self._is_wrong = said, True
            if self._equal is None or self._equal.frame != said.frame:
                self.doubted.add(said.frame)

    def taught(self, taught: Taught) -> None:
        """Take an example that was learned again."""
        if not self._is_wrong:
            self._learned += 1
            if len(self._suspects) < SUSPECTS:
                self._suspects.append(taught)

    def passed(self, passed: Passed) -> None:
        """Take a keyframe that was compared."""
        self.seen.add(passed.frame)
        if passed.difference is not None and not self._is_wrong:
            self._found.note(passed.frame.version, None, _of_keyframe(passed))

    def end(self) -> None:
        """Nothing more comes."""
        if self._wrong is not None:
            self._explain(self._wrong, alone=None)

    def _explain(self, said: Said, alone: bool | None) -> None:
        text = _unlike(said)
        if alone:
            text += "; those after it are right, so it is its own score, or its own features, that were changed"
        elif alone is False or self._learned:
            text += f"; {self._since()}"
        self._found.note(said.place[0], said.id, text)

    def _since(self) -> str:
        since = "the keyframe" if self._equal is None else f"{self._equal.id!r}, which is right,"
        if not self._learned:
            return f"nothing was learned since {since}, so the model itself was changed, or the code that it runs"
        named = ", ".join(repr(taught.id) for taught in self._suspects)
        more = f" and {self._learned - len(self._suspects):,} more" if self._learned > len(self._suspects) else ""
        return f"since {since} the model learned {named}{more}: the label or the features of one of these were changed"


def _unlike(said: Said) -> str:
    if said.version != said.examples:
        return (
            f"it was said after {said.version:,} examples, but {said.examples:,} are found before it: others were "
            "taken out of the learn log, or put in"
        )
    return f"it said {said.logged!r}, made again it is {said.output!r}"


class _Checkpoint:
    """The models of the newest checkpoint, to be compared with those that were learned again."""

    def __init__(self, job: Job, run: RunDirectory, lineage: Lineage) -> None:
        self._job, self._run = job, run
        fitting = [m for m in Checkpoints(run).all() if lineage.holds(m.version.number)] if run.groups.exists() else []
        self._manifest = fitting[-1] if fitting else None
        self._begun = 1
        if self._manifest is not None:
            layouts = {start.branch: start.layout for start in read_branches(run)}
            self._begun = layouts[self._manifest.branch].models
        self._keys: set[str] = set()

    def note_keys(self, keys: set[str]) -> None:
        """Of which models to compare."""
        self._keys = keys

    def targets(self) -> list[Target]:
        """How far these models have to be learned again."""
        if self._manifest is None:
            return []
        return [Target((self._manifest.version.number + 1, 0), key, self._begun) for key in sorted(self._keys)]

    def compare(self, again: Relearning, found: Findings) -> None:
        """Compare what the state store holds."""
        if self._manifest is None or not self._keys:
            return
        found.checkpoint = str(self._manifest.version)
        past = PastState(self._job, self._run, self._manifest)
        try:
            kept = {key_text(key): state for key, state in past.models().items()}
        finally:
            past.close()
        for key, (model, examples) in again.models(self._begun).items():
            state = kept.get(key)
            if state is None:
                continue
            unlike = first_difference(model, state.model, "model")
            if examples != state.version:
                unlike = f"it has learned {state.version:,} examples, and {examples:,} were found"
            found.models += 1
            found.models_equal += unlike is None
            if unlike is not None:
                text = f"the model of checkpoint {self._manifest.version} is not what was learned: {unlike}"
                found.note(self._manifest.version.number, None, text)


class _Line(msgspec.Struct):
    """What is looked at of a record first."""

    id: Any


class _Published:
    """Compares what was made again with what the outputs hold, line by line."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._files = dict(auditor.published()) if auditor.is_newest else {}
        self._lines: dict[str, dict[Any, int]] = {kind: {} for kind in self._files}
        self._said: dict[int, tuple[int, Any, int]] = {}

    def said(self, said: Said) -> None:
        """Take a prediction that was made again."""
        if "outcomes" in self._files:
            self._said[said.number] = (said.time, said.output, said.examples)
        self._expect("predictions", said.id, self._auditor.prediction, said)

    def taught(self, taught: Taught) -> None:
        """Take an example that was learned again."""
        said = self._said.pop(taught.number, None)
        if said is not None:
            self._expect("outcomes", taught.id, self._auditor.outcome, said, taught)

    def _expect(self, kind: str, id: EventId, record: Callable[..., Any], *of: Any) -> None:
        lines = self._lines.get(kind)
        if lines is not None and len(lines) < PUBLISHED:
            lines[id] = crc32(encode(record(*of)))

    def compare(self, found: Findings) -> None:
        """Read the outputs."""
        decoder = msgspec.json.Decoder(_Line)
        for kind, path in self._files.items():
            expected = self._lines[kind]
            count = 0
            with path.open("rb") as lines:
                for row, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        id = decoder.decode(line).id
                    except msgspec.DecodeError:
                        found.note(0, None, f"{path}:{row} is no record")
                        continue
                    wanted = expected.pop(id, None)
                    if wanted is not None:
                        count += 1
                        if wanted != crc32(line):
                            found.note(0, id, f"{path}:{row} is not what was said, when it is made again")
            found.published[kind] = count
