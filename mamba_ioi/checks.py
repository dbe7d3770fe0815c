"""Numbers that callers give, each refused in one sentence where it is none or out of range."""

from __future__ import annotations

import operator
from numbers import Real


def whole_number(value: int, name: str, *, least: int, most: int | None = None) -> int:
    """The value as an int; anything with `__index__` is one, but no bool.

    Raises:
        ValueError: if it is no whole number, below ``least`` or above ``most``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, not {value!r}")
    return number


def is_number(value: object) -> bool:
    """Whether the value is a real number, a scalar of numpy included, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)
