"""What an audit says of a difference: the right place, and no more than the evidence gives."""

from __future__ import annotations

from typing import Any

import pytest

from dataflows.findings import Findings, Trail
from dataflows.learnstore import Frame
from dataflows.relearn import Passed, Said, Taught
from dataflows.state import Version


def frame(examples: int) -> Frame:
    """A keyframe of so many examples."""
    return Frame(Version(1, examples).number, 0, 1, "null", examples, 0)


class Story:
    """A model's course as a trail is told it."""

    def __init__(self) -> None:
        self.found = Findings()
        self.trail = Trail(self.found)
        self.begin = frame(0)
        self.examples = 0
        self.asked = 0

    def say(self, right: bool = True, found: int | None = None, learned: bool = False) -> None:
        """A prediction, numbered from 1."""
        self.asked += 1
        examples = self.examples if found is None else found
        place = (Version(1, 1).number, self.asked)
        self.trail.said(
            Said(place, "null", self.asked, self.asked, 0, {}, False, 0.5, 0.5 if right else 0.6, self.examples,
                 examples, 0, learned, self.begin)
        )  # fmt: skip
        self.examples += learned

    def teach(self, number: int) -> None:
        """An outcome of a question."""
        self.examples += 1
        self.trail.taught(
            Taught((0, 0), "null", number, number, True, 0, False, self.examples, True, self.begin)
        )  # fmt: skip

    def keyframe(self, right: bool = True) -> bool:
        """A keyframe; whether one goes on from it."""
        return self.trail.passed(Passed(frame(self.examples), "null", None if right else "model.w: 1 and 2"))

    def told(self) -> list[tuple[Any, str]]:
        """What was found, by id."""
        self.trail.end()
        return [(wrong.id, wrong.text) for wrong in self.found.wrong]


def test_a_wrong_score_before_a_right_keyframe_was_changed_itself() -> None:
    """Each of several is named."""
    story = Story()
    for right in (True, False, True, False, True):
        story.say(right)
        story.teach(story.asked)
    assert not story.keyframe()
    assert [id for id, _ in story.told()] == [2, 4]
    assert all("its own score was changed" in text for _, text in story.told())


def test_a_changed_example_is_among_those_learned_since_what_was_right() -> None:
    """One goes on from the keyframe, and nothing is told twice."""
    story = Story()
    story.say()
    story.say()
    story.teach(1)
    for _ in range(3):
        story.say(right=False)
    assert story.keyframe(right=False)
    story.say()
    [(id, text)] = story.told()
    assert id == 3
    assert "since 2, which is right the model learned 1:" in text
    assert "3 differ" in text


def test_labels_revealed_at_once_leave_the_question_itself_under_suspicion() -> None:
    """It was learned from before the next was asked: its features may be the cause, and it is said so."""
    story = Story()
    for right in (True, True, False, False, False):
        story.say(right)
        story.teach(story.asked)
    assert story.keyframe(right=False)
    [(id, text)] = story.told()
    assert id == 3
    assert "or its own features" in text


def test_a_detector_that_learns_from_questions_suspects_these() -> None:
    """There is no outcome that taught it."""
    story = Story()
    for right in (True, True, False, False):
        story.say(right, learned=True)
    assert story.keyframe(right=False)
    [(id, text)] = story.told()
    assert id == 3
    assert "learned 2" in text


def test_a_keyframe_alone_was_changed_itself() -> None:
    """What comes after it is right without it."""
    story = Story()
    story.say()
    story.teach(1)
    assert not story.keyframe(right=False)
    story.say()
    story.teach(2)
    assert not story.keyframe()
    [(id, text)] = story.told()
    assert id is None
    assert "so the keyframe itself was changed" in text


def test_a_tree_that_shows_late_what_it_learned_is_allowed_for() -> None:
    """Right predictions in between do not clear what was learned before them."""
    story = Story()
    for number in range(1, 9):
        story.say()
        story.teach(number)
    story.say(right=False)
    story.say()
    assert story.keyframe(right=False)
    [(id, text)] = story.told()
    assert id == 9
    assert "or one of 8 learned since the keyframe of 0" in text


def test_missing_examples_are_told_by_their_number() -> None:
    """So many were learned then, so many are found."""
    story = Story()
    story.say()
    story.examples += 1
    story.say(found=0)
    [(id, text)] = story.told()
    assert id == 2
    assert "after 1 examples, but 0 are found before it" in text


@pytest.mark.parametrize("is_right", [True, False])
def test_the_checkpoint_tells_as_a_keyframe_does(is_right: bool) -> None:
    """Where the log has no keyframe after the difference."""
    story = Story()
    story.say()
    story.teach(1)
    story.say(right=False)
    story.say(right=is_right)
    story.trail.reached(None if is_right else "model.w: 1 and 2")
    [(id, text)] = story.told()
    assert id == 2
    assert ("its own score was changed" in text) == is_right


def test_more_than_some_are_only_counted() -> None:
    """The list of what is wrong stays short."""
    found = Findings()
    for number in range(50):
        found.note(0, number, "wrong")
    assert (len(found.wrong), found.wrong_in_all, found.passed) == (20, 50, False)
