"""What all declarations share: they are frozen, take no unknown parameters and compare by value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Declaration(BaseModel):
    """A frozen, validated description of something; the logic that runs it is kept elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __str__(self) -> str:
        return repr(self)
