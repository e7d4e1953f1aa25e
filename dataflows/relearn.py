"""Learning again: a part of a learn log carried out on a model as it was, which gives every later one.

From a keyframe on the calls that the log has after it are carried out again: questions are asked (some models draw
random numbers when they are), outcomes are learned. What was said then is only read to be compared with. On the way
every prediction is made again, and every keyframe that is passed is compared.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dataflows.events import EventId
from dataflows.learner import method_of
from dataflows.learnlog import ASKED, FAILED, HELD, LEARNING_FAILED, NOT_LEARNED, OUTCOME, PROTOTYPE, WENT_WELL
from dataflows.learnstore import Frame, Head, LearnReader
from dataflows.likeness import first_difference, same
from dataflows.state import StateError, Version
from features.rows import key_text


class _Mark:
    """In place of what was said."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


UNKNOWN = _Mark("unknown")
"""In place of what was said, where the log does not have it."""

NOTHING = _Mark("nothing: it failed")
"""In place of what was said, where the model failed then, and does not now."""

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
    learned by the log's word, `examples` those it has learned now, `relearned` those of them since `frame`. `learned`:
    the model then learned from the question itself.
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
    learned: bool
    frame: Frame

    @property
    def equal(self) -> bool:
        """Whether it is what was said, after as many examples."""
        return self.version == self.examples and (self.logged is UNKNOWN or same(self.output, self.logged))


class Taught(NamedTuple):
    """An outcome: the question's number and id, the label, when it was known (µs); `learned`: the model learned it."""

    place: Place
    key: str
    number: int
    id: EventId
    label: Any
    moment: int
    assumed: bool
    examples: int
    learned: bool
    frame: Frame


class Passed(NamedTuple):
    """A keyframe on the way, and where the model as learned again differs from it; None where it does not."""

    frame: Frame
    key: str
    difference: str | None


class Broken(NamedTuple):
    """A model that cannot go on as it did then, and why; `id` is the question's, if it is one that it fails at.

    `lost`: what it learned is not in the log any more. At the model's next keyframe it is taken up again.
    """

    place: Place
    key: str
    id: EventId | None
    text: str
    lost: bool
    frame: Frame


class Reached(NamedTuple):
    """The place at which models are to be looked at."""


Step = Said | Taught | Passed | Broken | Reached


class _Unlike(Exception):
    """A model does not do what it did then."""


class _Lost(Exception):
    """A question is not kept any more, or was taken out."""


class _Pupil:
    """A model that learns again."""

    def __init__(self, model: Any, segment: Segment) -> None:
        self.segment = segment
        self.relearned = 0
        self.is_used = segment.frame.key != PROTOTYPE  # of a prototype: whether it is anybody's yet
        self.become(model, segment.frame.examples)

    def become(self, model: Any, examples: int) -> None:
        """Be this model from now on."""
        self.model = model
        self.examples = examples
        self.answer = getattr(model, method_of(model)[0])
        self.learn = model.learn_one
        self.supervised: bool = model._supervised

    def ask(self, x: dict[str, Any], how: int) -> Any:
        """What it says; `UNKNOWN` where it failed, as it did then."""
        self.is_used = True
        try:
            output = self.answer(x)
        except Exception as error:  # noqa: BLE001 - what a model does not like
            if how != FAILED:
                raise _Unlike(f"it fails now, and did not then: {type(error).__name__}: {error}") from None
            return UNKNOWN
        if not self.supervised and how != FAILED:
            self._learned(how == LEARNING_FAILED, x)
        return output

    def teach(self, x: dict[str, Any], label: Any, how: int) -> None:
        """Learn an outcome, or fail to, as it did then."""
        self.is_used = True
        self._learned(how == FAILED, x, label)

    def _learned(self, failed: bool, *example: Any) -> None:
        try:
            self.learn(*example)
        except Exception as error:  # noqa: BLE001 - as above
            if not failed:
                raise _Unlike(f"it fails to learn it now, and did not then: {type(error).__name__}: {error}") from None
            return
        if failed:
            raise _Unlike("it failed to learn it then, and does not now")
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
    stop
        After which version (as a number) to say that it is `Reached`.
    """

    def __init__(self, log: LearnReader, segments: Iterable[Segment], stop: int | None = None) -> None:
        self._log = log
        self._stop = stop
        self._starts: dict[Frame, list[Segment]] = {}
        for segment in segments:
            self._starts.setdefault(segment.frame, []).append(segment)
        self._pupils: dict[tuple[int, str], _Pupil] = {}
        self._done: dict[tuple[int, str], _Pupil] = {}
        self._broken: dict[tuple[int, str], Segment] = {}
        self._questions = _Questions(log)
        self._frames: dict[int, list[Frame]] = {}
        for frame in log.frames():
            self._frames.setdefault(frame.version, []).append(frame)
        self.makers: set[int] = set()
        self.relearned = 0

    def run(self) -> Iterator[Step]:
        """Everything that is made again, in the order of the log."""
        orphans = sorted(set(self._frames) - {head.version for head in self._log.heads})
        for head in self._log.heads:
            while orphans and orphans[0] < head.version:
                yield from self._orphans(orphans.pop(0))
            if self._stop is not None and head.version > self._stop:
                self._stop = None
                yield Reached()
            self._drop(head.version)
            starts = any(frame in self._starts for frame in self._frames.get(head.version, ()))
            if self._pupils or self._broken or starts:
                self.makers.add(head.maker)
                yield from self._chunk(head)
        for version in orphans:
            yield from self._orphans(version)
        if self._stop is not None:
            yield Reached()

    def models(self, begun: int) -> dict[str, tuple[Any, int, bool]]:
        """By key: the models where they are now, what they have learned, and whether they were asked or taught."""
        pupils = self._done | self._pupils
        return {
            key: (pupil.model, pupil.examples, pupil.is_used)
            for (each, key), pupil in pupils.items()
            if each == begun and (each, key) not in self._broken
        }

    def adopt(self, passed: Passed) -> None:
        """Go on with the keyframe's model instead of the one that was learned again."""
        pupil = self._pupils[passed.frame.begun, passed.key]
        pupil.become(self._log.model(passed.frame), passed.frame.examples)

    def _drop(self, version: int) -> None:
        for place in [place for place, pupil in self._pupils.items() if pupil.segment.end < (version, 0)]:
            self._done[place] = self._pupils.pop(place)
        for place in [place for place, segment in self._broken.items() if segment.end < (version, 0)]:
            del self._broken[place]

    def _orphans(self, version: int) -> Iterator[Step]:
        """Keyframes without their chunk: it is kept no more, which the prototypes outlast, or was taken out."""
        for frame in self._frames[version]:
            starting = self._starts.get(frame, [])
            model = frame.begun, frame.key
            if model in self._pupils and not starting:
                starting = [self._pupils[model].segment._replace(frame=frame)]
            for segment in starting:
                self._pupils[frame.begun, segment.key] = _Pupil(self._log.model(frame), segment)
                if frame.key != PROTOTYPE:
                    text = "a chunk, with a keyframe in it, is not there any more"
                    yield Broken((version, 0), segment.key, None, text, False, frame)

    def _chunk(self, head: Head) -> Iterator[Step]:
        names, entries = self._log.entries(head.version)
        outputs = self._log.outputs(head.version)
        answered = sum(entry[0] == ASKED and entry[-1] != FAILED for entry in entries)
        if outputs is not None and len(outputs) != answered:
            raise self._log.not_as_written(head.version, f"a chunk of it, with {len(outputs)} outputs of {answered},")
        said = iter(outputs) if outputs is not None else None
        self._questions.prepare(head.version, names, entries)
        frames = iter(self._frames.get(head.version, ()))
        frame = next(frames, None)
        for place, entry in enumerate(entries):
            while frame is not None and frame.place <= place:
                yield from self._frame(frame)
                frame = next(frames, None)
            logged: Any = UNKNOWN
            if entry[0] == ASKED and said is not None:
                logged = NOTHING if entry[-1] == FAILED else next(said)
            key = entry[2]
            pupil = self._pupils.get((head.begun, key_text(key))) if type(key) is not list else None
            if pupil is not None and (head.version, place) < pupil.segment.end:
                yield from self._entry(pupil, head.begun, (head.version, place), names, entry, logged)
        while frame is not None:
            yield from self._frame(frame)
            frame = next(frames, None)

    def _frame(self, frame: Frame) -> Iterator[Passed]:
        model = frame.begun, frame.key
        place = frame.version, frame.place
        pupil = self._pupils.get(model)
        if pupil is not None and place <= pupil.segment.end:
            unlike = first_difference(pupil.model, self._log.model(frame), "model")
            if pupil.examples != frame.examples:
                unlike = f"it has learned {frame.examples:,} examples, and {pupil.examples:,} were found"
            yield Passed(frame, frame.key, unlike)
        if model in self._broken and place < self._broken[model].end:
            segment = self._broken.pop(model)._replace(frame=frame)
            self._pupils[model] = _Pupil(self._log.model(frame), segment)
        for segment in self._starts.get(frame, ()):
            self._broken.pop((frame.begun, segment.key), None)
            self._pupils[frame.begun, segment.key] = _Pupil(self._log.model(frame), segment)

    def _entry(
        self, pupil: _Pupil, begun: int, place: Place, names: tuple[str, ...], entry: tuple[Any, ...], logged: Any
    ) -> Iterator[Said | Taught | Broken]:
        key, frame, number = pupil.segment.key, pupil.segment.frame, entry[1]
        id: EventId | None = None
        if entry[0] == HELD:
            return
        try:
            if entry[0] == ASKED:
                _, _, _, id, time, kept, version, late, how = entry
                examples, relearned = pupil.examples, pupil.relearned
                shown = _shown(names, kept)
                output = pupil.ask(_features(names, kept), how)
                self.relearned += pupil.examples - examples
                if output is not UNKNOWN:
                    made = (output, logged, version, examples, relearned, pupil.examples > examples, frame)
                    yield Said(place, key, number, id, time, shown, late, *made)
            else:
                _, _, _, label, moment, assumed, how = entry
                if how == NOT_LEARNED and pupil.supervised:
                    return
                id, features = self._questions.find(number)
                if how != NOT_LEARNED:
                    pupil.teach(features, label, how)
                    self.relearned += how == WENT_WELL
                if how != FAILED:
                    learned = how == WENT_WELL
                    yield Taught(place, key, number, id, label, moment, assumed, pupil.examples, learned, frame)
        except (_Unlike, _Lost) as error:
            self._broken[begun, key] = self._pupils.pop((begun, key)).segment
            of = f"question {number}" if entry[0] == ASKED else f"the outcome of question {number}"
            text = f"entry {place[1]}, {of}: {error}"
            yield Broken(place, key, id, text, isinstance(error, _Lost), frame)


def _shown(names: tuple[str, ...], kept: Any) -> dict[str, Any]:
    """Features as records have them: those that were missing as None."""
    if type(kept) is tuple:
        return dict(zip(names, kept, strict=True))
    return {name: kept.get(name) for name in names}


def _features(names: tuple[str, ...], kept: Any) -> dict[str, Any]:
    """What a model was asked with."""
    return dict(zip(names, kept, strict=True)) if type(kept) is tuple else dict(kept)


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
        """Id and features. Raises `_Lost` where the question is not kept any more."""
        place = bisect_left(self._last, number)
        if place == len(self._heads) or (self._heads[place].first_question or 0) > number:
            raise _Lost("the question is not in the learn log any more")
        version = self._heads[place].version
        if version not in self._chunks:
            self._keep(version, *self._log.entries(version))
        self._chunks.move_to_end(version)
        names, asked = self._chunks[version]
        if number not in asked:
            raise _Lost(f"the question was taken out of batch {Version.of(version)} of the learn log")
        id, kept = asked[number]
        return id, _features(names, kept)

    def _keep(self, version: int, names: tuple[str, ...], entries: list[tuple[Any, ...]]) -> None:
        self._chunks[version] = names, {entry[1]: (entry[3], entry[5]) for entry in entries if entry[0] != OUTCOME}
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


class Beginning(NamedTuple):
    """From where a model can be made again; None: it cannot. `before`: its answered questions before that."""

    frame: Frame | None
    before: int

    def reaches(self, end: Place) -> bool:
        """Whether what lies before this place can be made again."""
        frame = self.frame
        return frame is not None and (frame.key == PROTOTYPE or (frame.version, frame.place) < end)


class _Course:
    """What a log has of one model: to find out from where it can be made again."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames  # those still ahead
        self.start: Frame | None = None
        self.born: bool | None = None  # as declared, all that it ever did is here; None: nothing is known yet
        self.learned = 0
        self.answered = 0
        self.before = 0

    def pass_frames(self, place: Place) -> None:
        """Take the keyframes up to a place."""
        while self.frames and (self.frames[0].version, self.frames[0].place) <= place:
            frame = self.frames.pop(0)
            if self.born is None:
                self.born = False  # it was there before the log
            if not self.born and self.start is None:
                self.start, self.before = frame, self.answered

    def lose(self) -> None:
        """What it learns now is not kept any more."""
        self.born, self.start = False, None


def beginnings(log: LearnReader) -> dict[tuple[int, str], Beginning]:
    """From where each model that the log knows can be made again: as it was declared, if all that it learned is kept.

    Else from the first keyframe after which all is kept. By how often the models were begun, and the model's key.
    """
    frames = log.frames()
    held = {head.version for head in log.heads}
    prototypes = _prototypes(frames)
    ahead: dict[tuple[int, str], list[Frame]] = {}
    for frame in frames:
        if frame.key != PROTOTYPE:
            ahead.setdefault((frame.begun, frame.key), []).append(frame)
    firsts = [head.first_question for head in log.heads if head.first_question is not None]
    first = min(firsts, default=0)
    courses: dict[tuple[int, str], _Course] = {}
    quiet: dict[int, bool] = {}
    for head in log.heads:
        names, entries = log.entries(head.version)
        for place, entry in enumerate(entries):
            if type(entry[2]) is list or entry[0] == HELD:
                continue
            model = (head.begun, key_text(entry[2]))
            course = courses.get(model)
            if course is None:
                course = courses[model] = _Course(ahead.get(model, []))
            course.pass_frames((head.version, place))
            how = entry[-1]
            if entry[0] != ASKED:
                course.learned += how == WENT_WELL
                if how != NOT_LEARNED and entry[1] < first:
                    course.lose()
                continue
            if course.born is None:
                prototype = prototypes.get(head.begun)
                course.born = prototype is not None and entry[6] - course.learned == prototype.examples
                if course.born and prototype is not None and prototype.version not in held:
                    # Was it asked before, and nothing kept of it? Some models change when they are.
                    if head.begun not in quiet:
                        quiet[head.begun] = _is_quiet(log.model(prototype), _features(names, entry[5]))
                    course.born = quiet[head.begun]
            course.answered += how != FAILED
    found: dict[tuple[int, str], Beginning] = {}
    for model, course in courses.items():
        course.pass_frames(END)
        if course.born:
            found[model] = Beginning(prototypes[model[0]], 0)
        else:
            found[model] = Beginning(course.start, course.answered if course.start is None else course.before)
    return found


def _prototypes(frames: list[Frame]) -> dict[int, Frame]:
    """By how often the models were begun: as what they begin."""
    return {frame.begun: frame for frame in reversed(frames) if frame.key == PROTOTYPE}


def _is_quiet(model: Any, x: dict[str, Any]) -> bool:
    """Whether a new model stays as it is when it is asked; this one does not have to."""
    before = pickle.loads(pickle.dumps(model, 5))
    try:
        getattr(model, method_of(model)[0])(dict(x))
    except Exception:  # noqa: BLE001 - whatever it does not like
        return False
    return same(before, model)


def segments(log: LearnReader, targets: Iterable[Target], to_keyframes: bool = False) -> list[Segment]:
    """The least that must be carried out again to come to these places, each from the nearest keyframe before.

    `to_keyframes`: each on to the next keyframe, so that this one is compared too.
    """
    frames = log.frames()
    prototypes = _prototypes(frames)
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
