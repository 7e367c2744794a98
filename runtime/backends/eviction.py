"""Eviction: remove cache rows that no query reads again, so a long sequence needs no more rows than a short one.

A query attends to the w keys with the largest biases among those before it. The w-th largest bias can only rise, so a
key that is once not among them never is again. Between two steps the slot's other rows are moved together, in their
order, and the graph's input `dropped_lengths` counts the evicted ones. The result equals that of keeping every row and
masking it.

B batch (slots), S new tokens, C cache capacity in rows, K key/value heads, d head size, w keys kept.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np

from runtime.artifact.manifest import Graph, State
from runtime.backends.arrays import widened

LOG = logging.getLogger(__name__)

Edit: TypeAlias = Callable[[int, State], AbstractContextManager[np.ndarray]]


class Eviction:
    """How many tokens of each slot of one allocation were evicted: none where the graph has no window."""

    def __init__(self, graph: Graph, batch: int):
        self.window, self.layers = graph.window, list(_layers(graph))
        self.evicted = np.zeros(batch, np.int64)

    def make_room(self, cache_lengths: np.ndarray, length: int, edit: Edit, first: int = 0) -> list[np.ndarray]:
        """Have room for S = `length` rows in the slots `first`, `first` + 1 …, of cache_lengths (B) tokens each.

        `edit(slot, state)` gives a slot's part of a cache, (K, C, size), and stores it when the block ends. Returns the
        rows in use and, with a window, the tokens that were evicted, (B) int64 each.
        """
        if self.window is None:
            return [cache_lengths]
        evicted = self.evicted[first : first + cache_lengths.size]
        evicted[cache_lengths == 0] = 0  # another sequence begins
        for slot in np.flatnonzero(cache_lengths - evicted + length > self.window.rows):
            rows = int(cache_lengths[slot] - evicted[slot])
            for key, value, bias in self.layers:
                with edit(first + int(slot), bias) as biases:
                    kept = largest_rows(joined(biases[:, :rows], bias.dtype), self.window.keep)
                    _keep(biases, kept)
                for state in (key, value):
                    with edit(first + int(slot), state) as cache:
                        _keep(cache, kept)
            evicted[slot] += rows - self.window.keep
            LOG.debug("slot %d: %d of %d cache rows evicted", first + slot, rows - self.window.keep, rows)
        return [cache_lengths - evicted, evicted]


def joined(digits: np.ndarray, dtype: str) -> np.ndarray:
    """The biases (K, rows), float32, which are the sums of their digits (K, rows, n) in `dtype`."""
    return widened(digits, dtype).astype(np.float32, copy=False).sum(-1)


def largest_rows(bias: np.ndarray, keep: int) -> np.ndarray:
    """Of bias (K, rows), the indices (K, keep) of the largest, rising; of equal ones the later are left out first."""
    last = np.partition(bias, -keep, axis=-1)[:, -keep, None]
    larger, tied = bias > last, bias == last
    later = np.cumsum(tied[:, ::-1], axis=-1)[:, ::-1]  # of a tied row: itself and the tied ones behind it
    chosen = larger | tied & (later <= keep - larger.sum(-1, keepdims=True))
    return np.nonzero(chosen)[1].reshape(-1, keep)


def _keep(cache: np.ndarray, kept: np.ndarray) -> None:
    """Move the rows `kept` (K, w) of cache (K, C, size) to its front."""
    for head, rows in zip(cache, kept, strict=True):
        head[: rows.size] = head[rows]


def _layers(graph: Graph) -> Iterator[tuple[State, State, State]]:
    """The caches of each attention layer: key, value, bias."""
    states = {state.input: state for state in graph.states}
    for name, state in states.items():
        layer, _, part = name.rpartition(".")
        if part == "bias":
            yield states[f"{layer}.key"], states[f"{layer}.value"], state
