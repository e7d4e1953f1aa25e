"""What an audit finds: counts, and for people where things began to be wrong, and what may have been changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataflows.events import EventId
from dataflows.learnstore import Frame
from dataflows.relearn import Broken, Passed, Said, Taught
from dataflows.state import Version

FINDINGS = 20
"""Of more things that are wrong only the count is kept."""

SUSPECTS = 5
"""Examples that are named as possibly changed."""


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
    is not kept any more. `broken` counts how often a model could not go on. `published` counts records of the outputs,
    by kind, that were compared too.
    """

    asked: int = 0
    equal: int = 0
    compared: int = 0
    compared_equal: int = 0
    unknown: int = 0
    unkept: int = 0
    broken: int = 0
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
    outputs: list[tuple[EventId, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything is as it was."""
        return not self.wrong_in_all and self.equal + self.unknown >= self.asked

    def note(self, batch: int, id: EventId | None, text: str) -> None:
        """Something is wrong."""
        self.wrong_in_all += 1
        if len(self.wrong) < FINDINGS:
            self.wrong.append(Wrong(Version.of(batch), id, text))


def of_keyframe(step: Passed) -> str:
    """What to say of a keyframe that is not what was learned."""
    return f"the keyframe of {step.frame.examples:,} examples is not what they give: {step.difference}"


class Trail:
    """Follows one model along its log, to say where things began to be wrong.

    A prediction that differs may have been changed itself, or its model was taught otherwise before. Which of them, the
    next keyframe tells: where the model is right there, nothing that it learned was changed. Where it is not, one goes
    on from that keyframe, so that one change does not hide the next.
    """

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._part: Frame | None = None
        self.doubted: set[Frame] = set()
        self.seen: set[Frame] = set()
        self._begin("the keyframe")

    def _begin(self, anchor: str) -> None:
        """Everything is right up to here."""
        self._anchor = anchor
        self._equal: Said | None = None  # the last one that was
        self._recent: list[EventId] = []  # what was learned since
        self._learned = 0
        self._since_anchor = 0
        self._wrong: list[Said] = []
        self._wrongs = 0
        self._rights = 0  # after the first wrong one, before that was learned from
        self._own = False  # the first wrong one was learned from
        self._odd: Passed | None = None  # a keyframe that differs, and it is not clear yet why
        self._odd_before: tuple[Said | None, list[EventId], int] | None = None
        self._is_told = False  # from here to the next keyframe nothing new can be said

    def said(self, said: Said) -> bool:
        """Take a prediction that was made again; whether its record is what is to be expected in the outputs."""
        self._enter(said.frame)
        if said.equal:
            if self._wrong:
                self._rights += not self._own
            else:
                self._equal, self._recent, self._learned = said, [], 0
                if said.learned:
                    self._learn(said.id)
            return True
        if not self._wrong and self._equal is None:
            self.doubted.add(said.frame)
        self._own = self._own or (said.learned and not self._wrong)
        self._wrongs += 1
        if len(self._wrong) < FINDINGS:
            self._wrong.append(said)
        return False

    def taught(self, taught: Taught) -> None:
        """Take an example that was learned again."""
        self._enter(taught.frame)
        if not taught.learned:
            return
        if self._wrong:
            self._own = self._own or taught.number == self._wrong[0].number
        else:
            self._learn(taught.id)

    def _learn(self, id: EventId) -> None:
        self._learned += 1
        self._since_anchor += 1
        if len(self._recent) < SUSPECTS:
            self._recent.append(id)

    def passed(self, passed: Passed) -> bool:
        """Take a keyframe that was compared; whether to go on from it."""
        self.seen.add(passed.frame)
        anchor = f"the keyframe of {passed.frame.examples:,}"
        if passed.difference is None:
            self._model_is_right(anchor)
            self._begin(anchor)
            return False
        if self._is_told or self._wrong or self._odd is not None:
            if not self._is_told:
                self._explain(is_right=False)
            self._begin(anchor)
            return True
        self._odd = passed
        self._odd_before = (self._equal, self._recent, self._learned)
        return False

    def reached(self, unlike: str | None) -> None:
        """Take the comparison with the checkpoint's model."""
        if unlike is None:
            self._model_is_right("the checkpoint")
            self._begin("the checkpoint")
        elif self._wrong or self._odd is not None:
            self._explain(is_right=False)
            self._is_told = True

    def broken(self, broken: Broken) -> None:
        """Take that the model cannot go on."""
        self.end()
        self._found.note(broken.place[0], broken.id, f"the model cannot go on as it did then: {broken.text}")
        self._begin("the keyframe")

    def end(self) -> None:
        """Nothing more comes of this part."""
        if not self._is_told:
            self._explain(is_right=None)

    def _enter(self, frame: Frame) -> None:
        """A part that begins at this keyframe."""
        if self._part != frame:
            if self._part is not None:
                self.end()
            self._part = frame
            self._begin(f"the keyframe of {frame.examples:,}")

    def _model_is_right(self, where: str) -> None:
        """What was wrong before a place where the model is right was changed itself."""
        if self._odd is not None:
            text = "; what comes after it is right without it, so the keyframe itself was changed"
            self._found.note(self._odd.frame.version, None, of_keyframe(self._odd) + text)
        for said in self._wrong:
            text = f"; the model is right in {where} after it, so its own score was changed"
            if not self._own:
                text += ", or its own features"
            self._found.note(said.place[0], said.id, _unlike(said) + text)

    def _explain(self, is_right: bool | None) -> None:
        """Say what began to differ; `is_right`: whether the model is right afterwards, None where nobody knows."""
        if self._odd is not None:
            equal, recent, learned = self._odd_before or (None, [], 0)
            text = f"{of_keyframe(self._odd)}; {self._suspected(equal, recent, learned, 'the keyframe itself')}"
            self._found.note(self._odd.frame.version, None, text)
            if is_right is False:
                return
        if not self._wrong:
            return
        first = self._wrong[0]
        text = _unlike(first)
        if first.version != first.examples:
            text += f", after {self._since(self._equal)}"
        elif self._rights and is_right is None and not self._own:
            text += "; those after it are right, so it is its own score that was changed, or its own features"
        elif self._rights and self._own:
            text += f"; those next to it are right, so its own features were changed{self._elsewhere()}"
        else:
            own = "its own features" if self._own else "its own score or features" if is_right is None else ""
            text += f"; {self._suspected(self._equal, self._recent, self._learned, own)}"
        if self._wrongs > 1:
            text += f"; up to the next keyframe {self._wrongs:,} differ"
        self._found.note(first.place[0], first.id, text)

    def _suspected(self, equal: Said | None, recent: list[EventId], learned: int, own: str) -> str:
        since = self._since(equal)
        if not learned:
            own = "its own features were changed" if equal is not None else "the model itself was changed, or its code"
            return f"nothing was learned since {since}, so {own}{self._elsewhere()}"
        named = ", ".join(map(repr, recent))
        more = f" and {learned - len(recent):,} more" if learned > len(recent) else ""
        own = f", or {own}" if own else ""
        return (
            f"since {since} the model learned {named}{more}: the label or the features of one of these{own} were "
            f"changed{self._elsewhere(learned)}"
        )

    def _since(self, equal: Said | None) -> str:
        return self._anchor if equal is None else f"{equal.id!r}, which is right"

    def _elsewhere(self, named: int = 0) -> str:
        """A tree may show much later what it was taught."""
        if self._since_anchor <= named:
            return ""
        return (
            f", or one of {self._since_anchor:,} learned since {self._anchor}, if the model does not show at once what "
            "it learns"
        )


def _unlike(said: Said) -> str:
    if said.version != said.examples:
        return (
            f"it was said after {said.version:,} examples, but {said.examples:,} are found before it: others were "
            "taken out of the learn log, or put in"
        )
    return f"it said {said.logged!r}, made again it is {said.output!r}"
