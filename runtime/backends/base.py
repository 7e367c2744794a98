"""What the engine expects of a backend: it says what it lacks on this machine, and opens a session, which runs steps.

B batch (slots), S new tokens, R rows of logits, C cache capacity, V vocabulary (of a classifier, its labels).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.artifact.manifest import Artifact, Graph
from runtime.host.budget import Budget


@dataclass(frozen=True)
class Options:
    """How to open a session.

    `threads`: threads of the CPU, None for the physical cores. `device`: the index of the card, 0 for the first.
    `budget`: what opening may take, None for what the machine has free.
    """

    threads: int | None = None
    device: int = 0
    budget: Budget | None = None


class Session(Protocol):
    """A loaded graph with a cache for each slot. The engine alone calls it, one call at a time, with checked values.

    `graph`: the artifact's graph, with the slots, capacities and lengths that this session serves. `chunk`: the most
    tokens S of a slot in one step. `most_rows`: the most of them, R, whose logits a step gives; 1 for the last alone.
    `batch` and `capacity`: B and C as they are now, 0 before `allocate`. `device_name`: the processor or card, for
    people. Every call may raise `RequestError` where memory is short.
    """

    graph: Graph
    chunk: int
    most_rows: int
    batch: int
    capacity: int
    device_name: str

    def allocate(self, batch: int, capacity: int) -> None:
        """Make `batch` empty slots with memory for `capacity` tokens each; what slots held before is gone."""
        ...

    def grow(self, capacity: int) -> None:
        """Make every slot hold up to `capacity` tokens, one of `graph.capacities`; the slots keep their content."""
        ...

    def shrink(self, capacity: int) -> None:
        """Let slots, none of which holds more than `capacity` tokens, need no more work than that; they keep content.

        A session whose caches stay as they were made does nothing.
        """
        ...

    def clear_slot(self, slot: int) -> None:
        """Set one slot's caches to zero."""
        ...

    def step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, argmax: bool = False
    ) -> np.ndarray:
        """Append tokens to the first n slots: input_ids (n, S), right-padded, of which sequence_lengths (n) are real.

        cache_lengths (B): the tokens that each slot holds already, of all slots; all are int64. A slot whose sequence
        length is 0 keeps its content, and a slot behind the first n too; whether it is computed is the backend's.
        Returns the logits (n, V), float32, of each slot's last real token, which may lie in a buffer that the next
        step overwrites; with `argmax` the ids (n,), int64, of the largest logits, -1 where logits are not finite, in
        an array of their own.
        """
        ...

    def step_rows(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, rows: int,
        argmax: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """`step`, with the logits (n, R, V) of each slot's last R = `rows` real tokens, at most `most_rows`, in order.

        Where a slot has fewer real tokens, the rows before theirs mean nothing. With `argmax` the ids (n, R).
        """
        ...

    def step_slot(
        self, slot: int, input_ids: np.ndarray, cache_lengths: np.ndarray, argmax: bool = False, rows: int = 1
    ) -> np.ndarray:
        """Append input_ids (S,), int64, to one slot; the others keep their content. cache_lengths (B) as in `step`.

        Returns logits, float32, (R, V), of the last R = `rows` ids, at most S and at most `most_rows`. They may lie in
        a buffer that the next step overwrites. With `argmax` the ids (R,), int64, of the largest logits, -1 where
        logits are not finite, in an array of their own.
        """
        ...

    @property
    def row_multiple(self) -> int:
        """A step of a multiple of this many slots gives each of them the same bits, whatever their number and order.

        1 where a step always computes all slots.
        """
        ...

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the content of `source`, a slot of `tokens` tokens."""
        ...

    def read_rows(self, slot: int, start: int, stop: int) -> list[np.ndarray] | None:
        """The cache rows of the tokens from `start` to `stop` of a slot that holds `stop` tokens.

        One array a state, in the caller's memory: (K, stop - start, size), or the whole of a state without rows. None
        where rows of the slot were evicted, so that rows are not at their tokens' places.
        """
        ...

    def write_rows(self, slot: int, start: int, rows: list[np.ndarray]) -> None:
        """Append what `read_rows` gave for the tokens from `start` to a slot that holds `start` tokens."""
        ...

    def close(self) -> None:
        """Give all memory back. The session cannot be used again; a second `close` does nothing."""
        ...


class Backend(Protocol):
    """One way to run an artifact. An instance of it is an entry of `runtime.backends.registry.BACKENDS`.

    `name`: what `load` and `--backend` call it. `has_devices`: whether `Options.device` chooses among several cards.
    Libraries that it alone needs are imported inside these functions, so that the others work without them.
    """

    name: str
    has_devices: bool

    def missing(self, artifact: Artifact) -> str | None:
        """What this machine or the artifact lacks and what to do about it, in one line; None if nothing is missing."""
        ...

    def open(self, artifact: Artifact, options: Options) -> Session:
        """A session. Raises `ArtifactError` where the artifact does not load, `RequestError` for a wrong device."""
        ...
