"""Rows of the caches that no query reads again are taken out, so that a long sequence needs no more than a short one.

A query attends to the w keys with the largest biases among those before it. The w-th largest bias can only rise, so a
key that is once not among them never is again. Between two steps the slot's other rows are moved together, in their
order, and `dropped_lengths` counts those that went: the same result as with every row in place and masked.

B batch (slots), S new tokens, C cache rows, K key/value heads, d head size, w keys kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np

from runtime.artifact.manifest import Graph, State

Edit: TypeAlias = Callable[[int, State], AbstractContextManager[np.ndarray]]


class Dropping:
    """What the slots of one allocation have dropped: nothing where the graph has no window."""

    def __init__(self, graph: Graph, batch: int):
        self.window, self.layers = graph.window, list(_layers(graph))
        self.dropped = np.zeros(batch, np.int64)

    def make_room(self, cache_lengths: np.ndarray, length: int, edit: Edit, first: int = 0) -> list[np.ndarray]:
        """Have room for S = `length` rows in the slots `first`, `first` + 1 …, of cache_lengths (B) tokens each.

        `edit(slot, state)` gives a slot's part of a cache, (K, C, size), and stores it when the block ends. Returns the
        rows that are taken and, with a window, the tokens that were dropped, (B) int64 each.
        """
        if self.window is None:
            return [cache_lengths]
        dropped = self.dropped[first : first + cache_lengths.size]
        dropped[cache_lengths == 0] = 0  # another sequence begins
        for slot in np.flatnonzero(cache_lengths - dropped + length > self.window.rows):
            rows = int(cache_lengths[slot] - dropped[slot])
            for key, value, bias in self.layers:
                with edit(first + int(slot), bias) as biases:
                    kept = largest_rows(biases[:, :rows, 0], self.window.keep)
                    _take(biases, kept)
                for state in (key, value):
                    with edit(first + int(slot), state) as cache:
                        _take(cache, kept)
            dropped[slot] += rows - self.window.keep
        return [cache_lengths - dropped, dropped]


def largest_rows(bias: np.ndarray, keep: int) -> np.ndarray:
    """Of bias (K, rows), the indices (K, keep) of the largest, rising; of equal ones the later go first.

    The biases are positive, so those of bfloat16 may be given as their bits: they are in the same order.
    """
    last = np.partition(bias, -keep, axis=-1)[:, -keep, None]
    larger, tied = bias > last, bias == last
    later = np.cumsum(tied[:, ::-1], axis=-1)[:, ::-1]  # of a tied row: itself and the tied ones behind it
    chosen = larger | tied & (later <= keep - larger.sum(-1, keepdims=True))
    return np.nonzero(chosen)[1].reshape(-1, keep)


def _take(cache: np.ndarray, kept: np.ndarray) -> None:
    """Put the rows `kept` (K, w) of cache (K, C, size) first."""
    for head, rows in zip(cache, kept, strict=True):
        head[: rows.size] = head[rows]


def _layers(graph: Graph) -> Iterator[tuple[State, State, State]]:
    """The caches of each attention layer: key, value, bias."""
    states = {state.input: state for state in graph.states}
    for name, state in states.items():
        layer, _, part = name.rpartition(".")
        if part == "bias":
            yield states[f"{layer}.key"], states[f"{layer}.value"], state
