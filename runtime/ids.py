"""What callers give as token ids, lengths, counts and slots, checked in one place."""

from typing import Any

import numpy as np

from runtime.errors import RequestError

SHAPES = {1: "(S,)", 2: "(B, S)"}
SEQUENCES = (np.ndarray, list, tuple, range)


def as_integers(value: Any, name: str, dimensions: int) -> np.ndarray:
    """`value` as an array of integers with this many dimensions, none of size 0.

    Takes arrays, lists, tuples and ranges of integers. Raises `RequestError` for everything else: texts, bytes, sets,
    None, rows of different lengths, and numbers that would have to be rounded. True and False are not numbers here.
    """
    expected = f"expected integers {SHAPES[dimensions]}, at least one"
    if not _holds_integers(value):
        found = type(value).__name__ if not isinstance(value, SEQUENCES) else "not all integers"
        raise RequestError(f"{name} are {found}; {expected}")
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        raise RequestError(f"{name} are rows of different lengths or too large; {expected}") from None
    if found.ndim != dimensions or found.dtype.kind not in "iu" or not found.size:
        raise RequestError(f"{name} are {found.dtype} of shape {found.shape}; {expected}")
    return found


def as_integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """`value` as an int from `least` to `most`. Raises `RequestError` for everything else."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} is {str(value)[:60]!r}; expected an integer, {bounds}")
    return int(value)


def _holds_integers(value: Any) -> bool:
    """Whether `value` is an array or a sequence with nothing but integers in it, however deep."""
    if not isinstance(value, list | tuple):
        return isinstance(value, SEQUENCES)
    kinds = set(map(type, value))
    if any(issubclass(kind, SEQUENCES) for kind in kinds):
        return all(isinstance(row, SEQUENCES) and _holds_integers(row) for row in value)
    return all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds)
