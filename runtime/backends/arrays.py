"""Caches and logits as numpy arrays: their types and sizes, and which rows of the logits count.

B batch (slots), S new tokens, R rows of logits, V vocabulary.
"""

from math import prod

import numpy as np

from runtime.artifact.manifest import State

# What numpy keeps a dtype in; it has no bfloat16.
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


def state_bytes(state: State, batch: int, rows: int) -> int:
    """Bytes of a cache for `batch` slots of `rows` rows."""
    return prod(state.sized(batch, rows)) * np.dtype(STORAGE[state.dtype]).itemsize


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that numpy can compute with. The bits of a bfloat16 are the upper half of a float32's."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values


def rows_index(state: State, rows: slice) -> tuple[slice, ...]:
    """The index of `rows` in a slot's part of a state, or of all of it where the state has no rows."""
    return tuple(rows if dim == "capacity" else slice(None) for dim in state.shape[1:])


def last_index(sequence_lengths: np.ndarray, count: int) -> np.ndarray:
    """The places (B, R), int64, of each slot's last R = `count` real tokens; the first stands for those it lacks."""
    return np.maximum(sequence_lengths[:, None] + np.arange(-count, 0), 0)


def last_rows(rows: np.ndarray, sequence_lengths: np.ndarray, count: int = 1) -> np.ndarray:
    """Of (B, S, n), the rows (B, R, n) of each slot's last R = `count` real tokens, as `last_index` has them."""
    if rows.shape[1] == 1:
        return rows
    return rows[np.arange(rows.shape[0])[:, None], last_index(sequence_lengths, count)]


def argmax_ids(logits: np.ndarray) -> np.ndarray:
    """The index (…), int64, of the largest of logits (…, V); -1 where they are not all finite."""
    largest, finite = logits.argmax(-1), np.isfinite(logits)
    return largest if finite.all() else np.where(finite.all(-1), largest, -1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The natural logarithms of the probabilities by logits (…, V): (…, V), float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return scores
