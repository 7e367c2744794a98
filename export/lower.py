"""A model's `step` lowered to one ONNX graph of opset 24.

    cache write                TensorScatter        one a cache, in place where one buffer is bound to both ends
    attention, mask added      Attention            grouped heads, one a layer
    rotary positions           RotaryEmbedding      cosines and sines computed once a step
    norms                      RMSNormalization
    q, k, v                    MatMul               one product, the weights side by side

B batch, S new tokens, R rows of logits, C cache capacity, D hidden size, H query heads, K key/value heads, d head size,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from export.forms import FormOptions
from export.tracing import TracedModel, trace
from runtime.artifact.manifest import Window, input_names
from wm_models import DogeConfig, LayerCache
from wm_models.context import StepContext
from wm_models.decoder import DecoderWithHead

OPSET = 24


class OnnxContext(StepContext):
    """A step whose cache writes, rotations and attention are one ONNX operator each."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cosine, sine = (table.to(x.dtype) for table in self.rotation)
        return torch.onnx.ops.rotary_embedding(x, cosine, sine)

    def replace(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new

    def split(self, bias: torch.Tensor, digits: int, dtype: torch.dtype) -> torch.Tensor:
        """By casts: ONNX has no operator for the bits of a number."""
        if digits == 1:
            return super().split(bias, digits, dtype)
        found = []
        for _ in range(digits - 1):
            found.append(bias.to(dtype))
            bias = bias - found[-1].to(bias.dtype)
        return torch.stack([*found, bias.to(dtype)], dim=-1)

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return _operator("TensorScatter", (cache, new, self.start), {"axis": 2}, cache)

    def attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return _operator("Attention", (query, key, value, mask), {"scale": scale}, query)


def _operator(name: str, inputs: tuple[torch.Tensor, ...], attributes: dict[str, Any], like: torch.Tensor) -> Any:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET)


class StepGraph(TracedModel):
    """`DecoderWithHead.step` with its states flattened."""

    def __init__(self, model: DecoderWithHead, all_logits: bool, options: FormOptions):
        super().__init__(model, options)
        self.indexed, self.evicts = not all_logits, options.evicts
        self.kinds: list[Any] = [type(cache) for cache in model.new_caches(1, 1)]  # NamedTuples

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        sequence_lengths: torch.Tensor,
        *states: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        rest = iter(states)
        lengths, dropped_lengths = (cache_lengths, sequence_lengths), next(rest) if self.evicts else None
        chosen: dict[str, Any] = {"logits_index": next(rest)} if self.indexed else {"all_logits": True}
        caches = [kind(*(next(rest) for _ in kind._fields)) for kind in self.kinds]
        logits, caches = self.model.step(
            input_ids, *lengths, caches, dropped_lengths, **chosen, context_type=OnnxContext
        )
        return (logits, *(state for cache in caches for state in cache))


def state_names(numbers: Sequence[int], caches: Sequence[LayerCache]) -> list[str]:
    """The input names of the states of the layers of these `numbers`, in order; an output's has `.out` behind."""
    return [f"layers.{layer}.{name}" for layer, cache in zip(numbers, caches, strict=True) for name in cache._asdict()]


def cache_window(config: DogeConfig, max_length: int, spare: int) -> Window | None:
    """How few rows of a cache are enough for sequences of `max_length` tokens; None where it takes as many.

    A query reads the w keys with the largest biases, and a key that is once not among them never is again: w rows, and
    `spare` to be filled before the others are taken out. That holds where a key head has one bias for all its query
    heads, and nothing else hides keys; see `StepContext`.
    """
    rows = config.keep_window_size + spare
    fixed = config.sliding_window is None and not config.dynamic_mask_ratio
    if rows >= max_length or not fixed or config.bias_heads != config.key_value_heads:
        return None
    return Window(config.keep_window_size, rows)


def lower(
    model: DecoderWithHead, *, max_batch: int, max_length: int, all_logits: bool, window: Window | None = None
) -> ir.Model:
    """The step graph of `model`, whose parameters it takes over. Batch, sequence and capacity are dynamic.

    Inputs `input_ids` (B, S), `cache_lengths` (B), `sequence_lengths` (B), with a `window` `dropped_lengths` (B),
    without `all_logits` `logits_index` (B, R), which of the S tokens get logits, all int64, and the states; outputs
    `logits` (B, R, V), or (B, S, V) with `all_logits`, where V is a classifier's number of labels, and the states.
    """
    evicts, max_length = window is not None, window.rows if window else max_length
    selects = max_length > model.config.keep_window_size or model.config.dynamic_mask_ratio > 0
    options = FormOptions(evicts, selects)
    graph = StepGraph(model, all_logits, options).eval()
    # Sizes of no meaning, but different from each other and from one, or the trace would take them for constants.
    caches, roomier = model.new_caches(2, 7), model.new_caches(2, 8)
    names = state_names(graph.traced, caches)
    states = [state for cache in caches for state in cache]
    length = 2 * getattr(model.config, "ssd_chunk_size", 1) + 1  # two tokens or more, and more than one chunk
    sample = (torch.zeros(2, length, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([length, 2]))
    dropped = [torch.tensor([0, 3])] if evicts else []
    index = [] if all_logits else [torch.tensor([[0, length - 1], [0, 1]])]
    batch = torch.export.Dim("batch", min=1, max=max(max_batch, 2))
    sequence = torch.export.Dim("sequence", min=1, max=max(max_length, length))
    rows = torch.export.Dim("rows", min=1, max=max(max_length, length))
    capacity = torch.export.Dim("capacity", min=2, max=max(max_length, 2))
    growing = [  # the dimensions that a larger capacity makes larger
        {at: capacity for at in range(state.ndim) if state.shape[at] != larger.shape[at]}
        for state, larger in zip(states, (state for cache in roomier for state in cache), strict=True)
    ]
    rest = [*({0: batch} for _ in dropped), *({0: batch, 1: rows} for _ in index)]
    rest += [{0: batch, **dims} for dims in growing]
    shapes = ({0: batch, 1: sequence}, {0: batch}, {0: batch}, tuple(rest))
    inputs = [*input_names(window is not None, not all_logits), *names]
    outputs = ["logits", *(f"{name}.out" for name in names)]
    return trace(graph, (*sample, *dropped, *index, *states), shapes, inputs, outputs, OPSET)
