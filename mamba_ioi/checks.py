"""Numbers that callers give, Python's, numpy's or torch's, each refused in one sentence where it does not fit."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any


def scalar(value):
    """Scalars of numpy and torch, and their arrays without dimensions, as Python's own numbers; all else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def integer(value: object) -> int | None:
    """The value as an int; None if it is no whole number, or a bool."""
    value = scalar(value)
    try:
        return None if isinstance(value, bool) else operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def whole_number(value: int, name: str, *, least: int, most: int | None = None) -> int:
    """The value as an int; anything with `__index__` is one, but no bool.

    Raises:
        ValueError: if it is no whole number, below ``least`` or above ``most``.
    """
    number = integer(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, not {value!r}")
    return number


def real_number(value: object) -> float | None:
    """The value as a real number of Python's own; None if it is none, or a bool."""
    number = scalar(value)
    return None if isinstance(number, bool) or not isinstance(number, Real) else number  # pyright: ignore[reportReturnType]


def integers(values: Any, name: str = "position") -> list[int]:
    """One whole number, or any collection of them, as a list of Python's own.

    Raises:
        ValueError: if one of them is no whole number, or a bool.
    """
    numbers = [integer(value) for value in listed(values)]
    if any(number is None for number in numbers):
        raise ValueError(f"{name}s are integers, not {values!r}")
    return [number for number in numbers if number is not None]


def listed(values) -> list:
    """One value, or any collection of them, tensors and arrays included, as a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) else [values]
