"""onnxruntime-genai as a session of the engine: the comparison with the eager model then runs the client itself.

B batch (slots), S new tokens, V vocabulary.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from export.clients.base import ClientSession
from runtime import ArtifactError
from runtime.artifact.manifest import Graph
from runtime.backends.arrays import argmax_ids
from runtime.host.denormals import flushed_denormals

CLIENT = "onnxruntime_genai"
CONFIG = "genai_config.json"


class GenaiSession(ClientSession):
    """A directory with a genai_config.json, loaded by genai.

    genai runs a batch in step: every row takes one token. So a batch is one generator until a slot sits a step out, or
    takes a token at which genai would end its row; from then on each slot has a generator of its own, which reads all
    that the slot holds.
    """

    def __init__(self, graph: Graph, directory: Path, keeps: Any = None):
        genai: Any = import_module(CLIENT)
        super().__init__(graph, keeps)
        self.genai, self.directory = genai, directory
        config = json.loads((directory / CONFIG).read_text())["model"]
        ends = config.get("eos_token_id", [])
        self.pad, self.ends = config.get("pad_token_id"), ends if isinstance(ends, list) else [ends]
        self.model = self._call(genai.Model, str(directory))
        self.tokens: list[list[int]] = []
        self.together: Any = None
        self.alone: dict[int, Any] = {}

    def allocate(self, batch: int, capacity: int) -> None:
        """Empty slots."""
        self.batch, self.capacity = batch, capacity
        self.tokens, self.together, self.alone = [[] for _ in range(batch)], None, {}

    def clear_slot(self, slot: int) -> None:
        """Empty one slot."""
        self._part()
        self.tokens[slot] = []
        self.alone.pop(slot, None)

    def step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, argmax: bool = False
    ) -> np.ndarray:
        """As `runtime.backends.base.Session.step`."""
        new = [row[:length].tolist() for row, length in zip(input_ids, sequence_lengths, strict=True)]
        if all(new) and not any(self.tokens) and self._can_pad(new):
            padded = np.full(input_ids.shape, self.pad or 0, np.int32)
            for row, ids in zip(padded, new, strict=True):
                row[: len(ids)] = ids
            self.together = self._generator(self.batch)
            logits = self._append(self.together, padded)
        elif self.together is not None and self.batch == 1:
            logits = self._append(self.together, input_ids[:, : len(new[0])].astype(np.int32))
        elif self.together is not None and all(len(row) == 1 and row[0] not in self.ends for row in new):
            logits = self._force(np.array(new))
        else:
            self._part()
            rows = [self._append_alone(slot, ids) for slot, ids in enumerate(new)]
            logits = np.concatenate(rows)
        for held, ids in zip(self.tokens, new, strict=True):
            held += ids
        return argmax_ids(logits) if argmax else logits

    def step_slot(
        self, slot: int, input_ids: np.ndarray, cache_lengths: np.ndarray, argmax: bool = False, rows: int = 1
    ) -> np.ndarray:
        """As `runtime.backends.base.Session.step_slot`."""
        self._part()
        logits = self._append_alone(slot, input_ids.tolist())
        self.tokens[slot] += input_ids.tolist()
        return argmax_ids(logits) if argmax else logits

    def close(self) -> None:
        """Let go of the generators and the model."""
        self.together, self.alone, self.model = None, {}, None
        super().close()

    def _can_pad(self, rows: list[list[int]]) -> bool:
        """Whether genai can read the rows as a batch: it takes what ends a row for padding where that is its id."""
        return len(rows) == 1 or (self.pad is not None and all(row[-1] != self.pad for row in rows))

    def _part(self) -> None:
        self.together = None

    def _append_alone(self, slot: int, ids: list[int]) -> np.ndarray:
        """The logits (1, V) of one slot after more ids; zeros where it has none."""
        if not ids:
            return np.zeros((1, self.graph.logits_width), np.float32)
        if slot not in self.alone:
            self.alone[slot], ids = self._generator(1), self.tokens[slot] + ids
        return self._append(self.alone[slot], np.array([ids], np.int32))

    def _generator(self, batch: int) -> Any:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=batch, max_length=self.graph.max_length)
        return self._call(self.genai.Generator, self.model, parameters)

    def _append(self, generator: Any, ids: np.ndarray) -> np.ndarray:
        self._call(generator.append_tokens, ids)
        return self._logits(generator, len(ids))

    def _force(self, ids: np.ndarray) -> np.ndarray:
        """Have the greedy search of a batch choose `ids` (B, 1)."""
        wanted = np.zeros((len(ids), 1, self.graph.vocabulary), np.float32)
        np.put_along_axis(wanted, ids[:, None], 1, axis=2)
        self._call(self.together.set_logits, wanted)
        self._call(self.together.generate_next_token)
        return self._logits(self.together, len(ids))

    def _logits(self, generator: Any, batch: int) -> np.ndarray:
        return np.asarray(self._call(generator.get_logits), np.float32).reshape(batch, -1)

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            with flushed_denormals():  # genai's first session would leave them off in the caller's thread
                return function(*arguments)
        except Exception as error:  # genai's exceptions share no narrower base
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{self.directory}: onnxruntime-genai refuses it: {reason}") from error
