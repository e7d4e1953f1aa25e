"""The mark of "nothing observed", for where None, 0, False and "" are values."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Missing(Enum):
    """The type of MISSING; an enum, because its member stays the same object through pickles."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
