"""Learning again: a part of a learn log carried out on a model as it was, which gives every later one.

From a keyframe on the calls that the log has after it are carried out again: questions are asked (some models draw
random numbers when they are), outcomes are learned. What was said then is only read to be compared with. On the way
every prediction is made again, and every keyframe that is passed is compared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dataflows.events import EventId
from dataflows.learner import method_of
from dataflows.learnlog import ASKED, FAILED, LEARNING_FAILED, PROTOTYPE, WENT_WELL
from dataflows.learnstore import Frame, Head, LearnReader
from dataflows.likeness import first_difference, same
from dataflows.state import StateError, Version
from features.rows import key_text

UNKNOWN = object()
"""In place of what was said, where the log does not have it."""

_CACHED_CHUNKS = 16
"""Chunks of which the questions are kept at hand: their outcomes come much later, but often together."""

Place = tuple[int, int]
"""A chunk, and the entry in it."""


class Segment(NamedTuple):
    """A part of a learn log to be carried out again for one model: from a keyframe up to an entry, without that one."""

    key: str
    frame: Frame
    end: Place


class Said(NamedTuple):
    """A prediction that was made again.

    `logged` is what was said then (`UNKNOWN` where the log does not have it), `version` the examples that the model had
    learned by the log's word, `examples` those it has learned now, `relearned` those of them since `frame`.
    """

    place: Place
    key: str
    number: int
    id: EventId
    time: int
    features: dict[str, Any]
    late: bool
    output: Any
    logged: Any
    version: int
    examples: int
    relearned: int
    frame: Frame

    @property
    def equal(self) -> bool:
        """Whether it is what was said, after as many examples."""
        return self.version == self.examples and (self.logged is UNKNOWN or same(self.output, self.logged))


class Taught(NamedTuple):
    """An example that was learned again: the question's number and id, the label, when it was known (µs)."""

    place: Place
    key: str
    number: int
    id: EventId
    label: Any
    moment: int
    assumed: bool
    examples: int


class Passed(NamedTuple):
    """A keyframe on the way, and where the model as learned again differs from it; None where it does not."""

    frame: Frame
    key: str
    difference: str | None


class _Pupil:
    """A model that learns again."""

    def __init__(self, model: Any, segment: Segment) -> None:
        self.model = model
        self.segment = segment
        self.examples = segment.frame.examples
        self.relearned = 0
        self.answer = getattr(model, method_of(model)[0])
        self.learn = model.learn_one
        self.supervised: bool = model._supervised

    def ask(self, x: dict[str, Any], how: int) -> Any:
        """What it says; `UNKNOWN` where it failed, as it did then."""
        try:
            output = self.answer(x)
        except Exception:
            if how != FAILED:
                raise
            return UNKNOWN
        if not self.supervised:
            self._learned(how == LEARNING_FAILED, x)
        return output

    def teach(self, x: dict[str, Any], label: Any, how: int) -> None:
        """Learn an outcome, or fail to, as it did then."""
        self._learned(how == FAILED, x, label)

    def _learned(self, failed: bool, *example: Any) -> None:
        try:
            self.learn(*example)
        except Exception:
            if not failed:
                raise
            return
        self.examples += 1
        self.relearned += 1


class Relearning:
    """Carries parts of one learn log out again.

    Parameters
    ----------
    log
        The log.
    segments
        Which parts; those of one model do not overlap.
    """

    def __init__(self, log: LearnReader, segments: Iterable[Segment]) -> None:
        self._log = log
        self._starts: dict[int, list[Segment]] = {}
        for segment in segments:
            self._starts.setdefault(segment.frame.version, []).append(segment)
        self._pupils: dict[tuple[int, str], _Pupil] = {}
        self._done: dict[tuple[int, str], _Pupil] = {}
        self._questions = _Questions(log)
        self._frames: dict[int, list[Frame]] = {}
        for frame in log.frames():
            self._frames.setdefault(frame.version, []).append(frame)
        self.makers: set[int] = set()
        self.relearned = 0

    def run(self) -> Iterator[Said | Taught | Passed]:
        """Everything that is made again, in the order of the log."""
        for head in self._log.heads:
            self._drop(head.version)
            if self._pupils or head.version in self._starts:
                self.makers.add(head.maker)
                yield from self._chunk(head)

    def models(self, begun: int) -> dict[str, tuple[Any, int]]:
        """By key: the models at the end of their last parts, and what they have learned."""
        pupils = self._done | self._pupils
        return {key: (pupil.model, pupil.examples) for (each, key), pupil in pupils.items() if each == begun}

    def _drop(self, version: int) -> None:
        done = [place for place, pupil in self._pupils.items() if pupil.segment.end < (version, 0)]
        for place in done:
            self._done[place] = self._pupils.pop(place)

    def _chunk(self, head: Head) -> Iterator[Said | Taught | Passed]:
        names, entries = self._log.entries(head.version)
        outputs = self._log.outputs(head.version)
        said = iter(outputs) if outputs is not None else None
        self._questions.prepare(head.version, names, entries)
        frames = self._frames.get(head.version, [])
        for place, entry in enumerate(entries):
            while frames and frames[0].place <= place:
                yield from self._frame(frames[0], head)
                frames = frames[1:]
            logged = UNKNOWN
            if entry[0] == ASKED and entry[-1] != FAILED and said is not None:
                logged = next(said, UNKNOWN)
            key = entry[2]
            pupil = self._pupils.get((head.begun, key_text(key))) if type(key) is not list else None
            if pupil is not None and (head.version, place) < pupil.segment.end:
                yield from self._entry(pupil, (head.version, place), names, entry, logged)
        for frame in frames:
            yield from self._frame(frame, head)

    def _frame(self, frame: Frame, head: Head) -> Iterator[Passed]:
        pupil = self._pupils.get((frame.begun, frame.key))
        starting = [segment for segment in self._starts.get(head.version, ()) if segment.frame == frame]
        if pupil is not None and (frame.version, frame.place) <= pupil.segment.end:
            kept = self._log.model(frame)
            unlike = first_difference(pupil.model, kept, "model")
            if pupil.examples != frame.examples:
                unlike = f"it has learned {frame.examples} examples, and {pupil.examples} were found"
            yield Passed(frame, pupil.segment.key, unlike)
        for segment in starting:
            self._pupils[frame.begun, segment.key] = _Pupil(self._log.model(frame), segment)

    def _entry(
        self, pupil: _Pupil, place: Place, names: tuple[str, ...], entry: tuple[Any, ...], logged: Any
    ) -> Iterator[Said | Taught]:
        key = pupil.segment.key
        try:
            if entry[0] == ASKED:
                _, number, _, id, time, kept, version, late, how = entry
                examples = pupil.examples
                output = pupil.ask(_features(names, kept), how)
                if how != FAILED:
                    shown = dict(zip(names, kept, strict=True)) if type(kept) is tuple else _whole(names, kept)
                    made = (output, logged, version, examples, pupil.relearned, pupil.segment.frame)
                    yield Said(place, key, number, id, time, shown, late, *made)
            elif entry[-1] in (WENT_WELL, FAILED):
                _, number, _, label, moment, assumed, how = entry
                id, features = self._questions.find(number)
                pupil.teach(features, label, how)
                self.relearned += 1
                yield Taught(place, key, number, id, label, moment, assumed, pupil.examples)
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model makes of a log that was changed
            what = "question" if entry[0] == ASKED else "outcome of question"
            raise StateError(
                f"the learn log {self._log.path}, batch {Version.of(place[0])}, entry {place[1]}: the model failed at "
                f"{what} {entry[1]}, as it did not then: {type(error).__name__}: {error}"
            ) from None


def _features(names: tuple[str, ...], kept: Any) -> dict[str, Any]:
    """What a model was asked with."""
    return dict(zip(names, kept, strict=True)) if type(kept) is tuple else dict(kept)


def _whole(names: tuple[str, ...], kept: dict[str, Any]) -> dict[str, Any]:
    """With the features that were missing, as None."""
    return {name: kept.get(name) for name in names}


class _Questions:
    """Finds the features that a question was asked with, by its number."""

    def __init__(self, log: LearnReader) -> None:
        self._log = log
        self._heads = [head for head in log.heads if head.last_question is not None]
        self._last = [head.last_question or 0 for head in self._heads]
        self._chunks: OrderedDict[int, tuple[tuple[str, ...], dict[int, tuple[EventId, Any]]]] = OrderedDict()

    def prepare(self, version: int, names: tuple[str, ...], entries: list[tuple[Any, ...]]) -> None:
        """Take the questions of a chunk that was read anyway."""
        self._keep(version, names, entries)

    def find(self, number: int) -> tuple[EventId, dict[str, Any]]:
        """Id and features. Raises `StateError` where the question is not kept any more."""
        place = bisect_left(self._last, number)
        if place == len(self._heads) or (self._heads[place].first_question or 0) > number:
            raise StateError(f"the learn log {self._log.path} does not hold question {number} any more")
        version = self._heads[place].version
        if version not in self._chunks:
            self._keep(version, *self._log.entries(version))
        self._chunks.move_to_end(version)
        names, asked = self._chunks[version]
        if number not in asked:
            raise self._log.not_as_written(version, f"question {number} is missing: a chunk of it")
        id, kept = asked[number]
        return id, _features(names, kept)

    def _keep(self, version: int, names: tuple[str, ...], entries: list[tuple[Any, ...]]) -> None:
        self._chunks[version] = names, {entry[1]: (entry[3], entry[5]) for entry in entries if entry[0] == ASKED}
        while len(self._chunks) > _CACHED_CHUNKS:
            self._chunks.popitem(last=False)


# -- what to carry out again


class Target(NamedTuple):
    """A place in a log to come to: the first entry not carried out, a model's key as text, how often it was begun."""

    end: Place
    key: str
    begun: int


END: Place = (1 << 62, 0)
"""Beyond every place of a log."""


def beginnings(log: LearnReader) -> tuple[dict[tuple[int, str], Frame | None], int]:
    """From where each model that the log knows can be made again: as it was declared, if all that it learned is kept.

    Else from its first keyframe; None where there is none. By how often the models were begun, and the model's key; and
    how many answered questions lie before that.
    """
    firsts: dict[tuple[int, str], Frame] = {}
    for frame in log.frames():
        firsts.setdefault((frame.begun, frame.key), frame)
    found: dict[tuple[int, str], Frame | None] = {}
    before = 0
    for head in log.heads:
        for place, entry in enumerate(log.entries(head.version)[1]):
            if entry[0] != ASKED:
                continue
            model = (head.begun, key_text(entry[2]))
            if model not in found:
                prototype = firsts.get((head.begun, PROTOTYPE))
                is_new = prototype is not None and entry[6] == prototype.examples
                found[model] = prototype if is_new else firsts.get(model)
            first = found[model]
            if entry[-1] != FAILED and (first is None or (head.version, place) < (first.version, first.place)):
                before += 1
    return found, before


def segments(log: LearnReader, targets: Iterable[Target], to_keyframes: bool = False) -> list[Segment]:
    """The least that must be carried out again to come to these places, each from the nearest keyframe before.

    `to_keyframes`: each on to the next keyframe, so that this one is compared too.
    """
    frames = log.frames()
    prototypes = {frame.begun: frame for frame in reversed(frames) if frame.key == PROTOTYPE}
    of_model: dict[tuple[int, str], list[Frame]] = {}
    for frame in frames:
        of_model.setdefault((frame.begun, frame.key), []).append(frame)
    found: dict[tuple[str, Frame], Place] = {}
    for end, key, begun in sorted(targets):
        mine = of_model.get((begun, key), [])
        after = bisect_left(mine, end, key=lambda frame: (frame.version, frame.place))
        nearest = mine[after - 1] if after else prototypes.get(begun)
        if nearest is None:
            raise StateError(
                f"the learn log {log.path} has no model any more from which batch {Version.of(end[0])} can be reached"
            )
        to_next = to_keyframes and after < len(mine)
        found[key, nearest] = (mine[after].version, mine[after].place) if to_next else end
    return [Segment(key, frame, end) for (key, frame), end in found.items()]
