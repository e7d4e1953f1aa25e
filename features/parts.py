"""Features of one Entity declaration whose state began at different times: what was added later has a part of its own.

To a job with state features can be added and taken away. The state of those that stay is left as it is, under the
declaration that it was made for; those that came later start empty, in parts of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from features.spec import Entity
from features.state import EntityFeatures, Key


class FeatureParts:
    """Several `EntityFeatures` that answer as one.

    Parameters
    ----------
    declaration
        What is declared now: its columns are those of the values that come, its names those of the answers.
    parts
        Each part's features, and which of them are asked for.

    >>> from features.aggregates import Count, Sum
    >>> old, new = Entity("card", [Count()]), Entity("card", [Sum("amount"), Count()])
    >>> cards = EntityFeatures(old)
    >>> _ = cards.ask("c-1", 0, ())
    >>> both = FeatureParts(new, [(cards, old.feature_names), (EntityFeatures(new), ("amount_sum_by_card",))])
    >>> both.ask("c-1", 1, (5.0,))
    (5.0, 2)
    """

    def __init__(self, declaration: Entity, parts: Sequence[tuple[EntityFeatures, Sequence[str]]]) -> None:
        self.names = declaration.feature_names
        self.parts = [features for features, _ in parts]
        # By part: where its columns are among the values that come; -1 where they do not come any more.
        columns = declaration.columns
        self._columns = [[columns.index(c) if c in columns else -1 for c in part.columns] for part in self.parts]
        # By feature that is declared: in which part's answer it is, and at which place.
        where = {name: (i, part.names.index(name)) for i, (part, names) in enumerate(parts) for name in names}
        self._places = [where[name] for name in self.names]

    def ask(self, key: Key, t: int, values: tuple[Any, ...]) -> tuple[object, ...]:
        """See `EntityFeatures.ask`."""
        taken = zip(self.parts, self._taken(values), strict=True)
        return self._picked([part.ask(key, t, some) for part, some in taken])

    def observe(self, key: Key, t: int, values: tuple[Any, ...]) -> None:
        """See `EntityFeatures.observe`."""
        for part, some in zip(self.parts, self._taken(values), strict=True):
            part.observe(key, t, some)

    def read(self, key: Key, t: int) -> tuple[object, ...]:
        """See `EntityFeatures.read`."""
        return self._picked([part.read(key, t) for part in self.parts])

    def sweep(self, clock: int) -> int:
        """See `EntityFeatures.sweep`."""
        return sum(part.sweep(clock) for part in self.parts)

    @property
    def unsaved(self) -> int:
        """See `EntityFeatures.unsaved`."""
        return sum(part.unsaved for part in self.parts)

    def _taken(self, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """For each part the values of its columns; None for those that nobody declares any more."""
        return [tuple([values[i] if i >= 0 else None for i in columns]) for columns in self._columns]

    def _picked(self, answers: list[tuple[object, ...]]) -> tuple[object, ...]:
        return tuple([answers[i][place] for i, place in self._places])
