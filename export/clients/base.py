"""What the clients' sessions have in common: the engine only prefills and decodes with them, for a comparison."""

from typing import Any, NoReturn

import numpy as np

from runtime import ArtifactError
from runtime.artifact.manifest import Graph


class ClientSession:
    """The part of `runtime.backends.base.Session` that is the same for every client.

    `keeps`: what must live as long as the session, such as the directory that it was loaded from.
    """

    device_name = "CPU"
    row_multiple = most_rows = 1

    def __init__(self, graph: Graph, keeps: Any = None):
        self.graph, self.chunk, self.keeps = graph, graph.max_length, keeps
        self.batch = self.capacity = 0

    def grow(self, capacity: int) -> None:
        """Nothing to do: a client's caches grow by themselves, or have room for the longest sequence."""
        self.capacity = capacity

    def shrink(self, capacity: int) -> None:
        """Nothing to do, as in `grow`."""

    def step_rows(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, rows: int,
        argmax: bool = False,
    ) -> NoReturn:  # fmt: skip
        """Raises `ArtifactError`: a client gives the logits of the last token alone."""
        raise ArtifactError("a client gives the logits of the last token alone")

    def copy_slot(self, source: int, target: int, tokens: int) -> NoReturn:
        """Raises `ArtifactError`: a client's caches are its own."""
        raise ArtifactError("a client's caches cannot be copied")

    def read_rows(self, slot: int, start: int, stop: int) -> None:
        """None: a client's caches cannot be read."""

    def write_rows(self, slot: int, start: int, rows: list[np.ndarray]) -> NoReturn:
        """Raises `ArtifactError`: a client's caches are its own."""
        raise ArtifactError("a client's caches cannot be written")

    def close(self) -> None:
        """Let go of what the session kept."""
        self.keeps = None
