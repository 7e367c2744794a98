"""Graphs whose new tokens come with an attention mask, as sessions of the engine: in ONNX Runtime or in OpenVINO.

B batch (slots), S new tokens, T tokens so far with the new ones, C cache capacity, V vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from export.clients.base import ClientSession
from runtime import ArtifactError
from runtime.artifact.manifest import Graph
from runtime.backends.arrays import argmax_ids

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "f32": np.float32, "f16": np.float16}
POSITIONS = "position_ids"


class Past(NamedTuple):
    """A state input: its name, its shape with None for the dimensions that are open, and its element type."""

    name: str
    shape: tuple[int | None, ...]
    kind: Any


class Runner(Protocol):
    """A loaded graph. `past`: its state inputs, in the order of their outputs. `positions`: it wants position_ids."""

    past: list[Past]
    positions: bool

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The logits, then the states, in the order of `past`."""
        ...


class OrtRunner:
    """A graph in ONNX Runtime on a CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.past = [
            Past(value.name, tuple(dim if isinstance(dim, int) else None for dim in value.shape), KINDS[value.type])
            for value in inputs
            if len(value.shape) > 2
        ]
        self.positions = POSITIONS in [value.name for value in inputs]
        self.outputs = ["logits", *(_present(past.name) for past in self.past)]

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(self.outputs, feed)


class OpenVinoRunner:
    """A graph in OpenVINO on a CPU, in the precision that it is written in."""

    def __init__(self, path: Path):
        import openvino

        model = openvino.Core().read_model(path)
        self.past = [
            Past(
                value.get_any_name(),
                tuple(None if dim.is_dynamic else dim.get_length() for dim in value.get_partial_shape()),
                KINDS[value.get_element_type().get_type_name()],
            )
            for value in model.inputs
            if value.get_partial_shape().rank.get_length() > 2
        ]
        self.positions = POSITIONS in [value.get_any_name() for value in model.inputs]
        self.compiled: Any = openvino.Core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
        self.outputs = ["logits", *(_present(past.name) for past in self.past)]

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.compiled(feed)
        return [np.array(found[name]) for name in self.outputs]


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


class MaskedSession(ClientSession):
    """A graph that takes input_ids (B, S), attention_mask (B, T) and states, and for some position_ids (B, S).

    `capacity`: the rows of its caches, where they are buffers of a fixed size; 0 where they grow. With `mixed` padding
    every second slot is padded on the left, the others on the right.
    """

    def __init__(self, graph: Graph, runner: Runner, capacity: int = 0, mixed: bool = False, keeps: Any = None):
        super().__init__(graph, keeps)
        self.runner, self.rows, self.mixed = runner, capacity, mixed
        self.mask = np.zeros((0, 0), np.int64)
        self.states: dict[str, np.ndarray] = {}

    def allocate(self, batch: int, capacity: int) -> None:
        """Empty slots."""
        self.batch, self.capacity, self.mask = batch, capacity, np.zeros((batch, 0), np.int64)
        self.states = {
            past.name: np.zeros([batch, *(self.rows if dim is None else dim for dim in past.shape[1:])], past.kind)
            for past in self.runner.past
        }

    def clear_slot(self, slot: int) -> None:
        """Hide what the slot holds."""
        self.mask[slot] = 0

    def step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, argmax: bool = False
    ) -> np.ndarray:
        """As `runtime.backends.base.Session.step`."""
        width = input_ids.shape[1]
        columns = np.arange(width)
        ids, real = input_ids.copy(), columns < sequence_lengths[:, None]
        if self.mixed:
            for slot in range(1, self.batch, 2):
                gap = width - int(sequence_lengths[slot])
                ids[slot], real[slot] = np.roll(ids[slot], gap), np.roll(real[slot], gap)
        self.mask = np.concatenate([self.mask, real.astype(np.int64)], axis=1)
        feed = {"input_ids": ids, "attention_mask": self.mask, **self.states}
        if self.runner.positions:
            feed[POSITIONS] = np.maximum(self.mask.cumsum(1)[:, -width:] - 1, 0)
        try:
            logits, *states = self.runner.run(feed)
        except Exception as error:  # the clients' own exceptions share no narrower base
            raise ArtifactError(f"a step of the graph failed: {str(error).splitlines()[0]}") from error
        self.states = dict(zip(self.states, states, strict=True))
        last = np.zeros(self.batch, np.int64)
        if logits.shape[1] > 1:
            last = np.where(real, columns, 0).max(1)
        found = logits[np.arange(self.batch), last].astype(np.float32)
        return argmax_ids(found) if argmax else found

    def step_slot(
        self, slot: int, input_ids: np.ndarray, cache_lengths: np.ndarray, argmax: bool = False, rows: int = 1
    ) -> np.ndarray:
        """As `runtime.backends.base.Session.step_slot`: the other slots sit this step out."""
        ids, lengths = np.zeros((self.batch, input_ids.size), np.int64), np.zeros(self.batch, np.int64)
        ids[slot], lengths[slot] = input_ids, input_ids.size
        return self.step(ids, cache_lengths, lengths, argmax)[slot : slot + 1]
