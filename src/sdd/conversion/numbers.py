"""Checks of numbers that a user, or a file, gives."""

import math
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_size(value: Any) -> bool:
    """Whether it is a finite number, and not negative."""
    return is_finite(value) and value >= 0
