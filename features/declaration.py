"""What all declarations share: they are frozen, take no unknown parameters and compare by value."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Declaration(BaseModel):
    """A frozen, validated description of something; the logic that runs it is kept elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def __str__(self) -> str:
        return repr(self)
