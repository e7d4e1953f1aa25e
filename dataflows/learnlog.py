"""The learn log: everything that was asked of a model and taught to it, in order, so that it can be made again.

The learner notes each call here as plain values; `dataflows.learnstore` keeps them. With a model as it was at some
place in the log (a keyframe), the calls after it give every later version, and every prediction again.

What models said is noted beside the calls and not among them: to make a prediction again nobody needs to know it.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

from features.rows import key_text

ASKED = 0
OUTCOME = 1
HELD = 2
"""The kinds of entries, with these fields:
(ASKED, question's number, model key, id, event time µs, features kept, version, late, how it went),
(OUTCOME, question's number, model key, label, moment µs, assumed, how it went),
(HELD, and the fields of ASKED): a question that is older than the log and waits for its label, noted at the beginning
for what is learned from it.

The features are the tuple of their values in the order of the chunk's names, or a dict where some are missing. The key
of a model that is gone is a list (see `Learner.open_questions`).
"""

_FIELDS = {ASKED: 9, OUTCOME: 7, HELD: 9}

WENT_WELL = 0
FAILED = 1
"""The model raised an error: when it was asked, or when it was taught by an outcome."""

NOT_LEARNED = 2
"""An outcome that taught nobody: the model needs no labels, or is gone."""

LEARNING_FAILED = 3
"""A question that was answered, from which the model (one that needs no labels) then failed to learn."""

PROTOTYPE = "*"
"""In place of a model's key: the model as declared, which every new one begins as. No `key_text` begins so."""


class Keyframe(NamedTuple):
    """A model as it was: `place` entries of its chunk had been carried out; its key as text; what it had learned."""

    place: int
    key: str
    examples: int
    pickled: bytes


class Chunk(NamedTuple):
    """Some entries in order, with what is needed to read them.

    `names` are the features' names, `fields` those of all entries one after the other, `outputs` what the answered
    questions were told, in their order.
    """

    names: tuple[str, ...]
    fields: list[Any]
    outputs: list[Any]
    frames: list[Keyframe]


def entries_of(fields: list[Any]) -> list[tuple[Any, ...]]:
    """The entries of a chunk.

    >>> entries_of([OUTCOME, 1, None, True, 20, False, 0])
    [(1, 1, None, True, 20, False, 0)]
    """
    entries, begin = [], 0
    while begin < len(fields):
        end = begin + _FIELDS[fields[begin]]
        entries.append(tuple(fields[begin:end]))
        begin = end
    return entries


class LearnLog:
    """Takes down what one learner does until it is kept.

    Parameters
    ----------
    names
        The features, in the order of their values.
    every
        Examples between two keyframes of a model.
    begins
        Whether nothing was kept yet of these models: then models that are older than the log get a keyframe each.

    >>> log = LearnLog(("amount",), every=2)
    >>> log.asked(1, None, "a", 10, (5.0,), 0, False, 0.5)
    >>> log.learned(1, None, True, 20, False)
    >>> [len(part) for part in log.take()], len(log)
    ([1, 16, 1, 0], 0)
    """

    def __init__(self, names: tuple[str, ...], every: int, begins: bool = True) -> None:
        self.every = every
        self.begins = begins
        self._names = names
        self._count = 0
        # Flat: a tuple for each entry would be looked at by the garbage collector, which costs more than all the rest.
        self._fields: list[Any] = []
        self._outputs: list[Any] = []
        self._frames: list[Keyframe] = []

    def __len__(self) -> int:
        return self._count + len(self._frames)

    def asked(
        self, seq: int, key: Any, id: Any, time: int, kept: Any, version: int, late: bool, output: Any, how: int = 0
    ) -> None:
        """A question that was answered."""
        self._count += 1
        self._fields += (ASKED, seq, key, id, time, kept, version, late, how)
        self._outputs.append(output)

    def failed(self, seq: int, key: Any, id: Any, time: int, kept: Any, version: int, late: bool) -> None:
        """A question at which the model raised an error; it may have changed all the same."""
        self._count += 1
        self._fields += (ASKED, seq, key, id, time, kept, version, late, FAILED)

    def held(self, seq: int, key: Any, id: Any, time: int, kept: Any, version: int) -> None:
        """A question that was asked before the log began."""
        self._count += 1
        self._fields += (HELD, seq, key, id, time, kept, version, False, NOT_LEARNED)

    def learned(self, seq: int, key: Any, label: Any, moment: int, assumed: bool, how: int = WENT_WELL) -> None:
        """An outcome, and whether the model learned from it."""
        self._count += 1
        self._fields += (OUTCOME, seq, key, label, moment, assumed, how)

    def keyframe(self, key: Any, examples: int, model: Any) -> None:
        """A model as it is now."""
        self._frames.append(Keyframe(self._count, key_text(key), examples, pickle.dumps(model, 5)))

    def prototype(self, pickled: bytes, examples: int) -> None:
        """What every new model begins as."""
        self._frames.append(Keyframe(self._count, PROTOTYPE, examples, pickled))

    def take(self) -> Chunk:
        """All since the last call."""
        chunk = Chunk(self._names, self._fields, self._outputs, self._frames)
        self._count, self._fields, self._outputs, self._frames = 0, [], [], []
        return chunk
