"""What every group of settings is: frozen, typed, explained under each field."""

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
"""Whole numbers that torch and numpy can hold."""


class Section(BaseModel):
    """A group of settings; `python -m megatron_mm.train --help` prints the docstring of each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    low = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*low, *(number // candidate for candidate in low)})
