"""Types of the options of task families. They are checked when a job is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]
Ways = Annotated[int, Field(ge=2)]
"""Number of classes of a task."""
Fraction = Annotated[float, Field(ge=0, le=1)]
