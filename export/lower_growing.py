"""A model lowered to one ONNX graph of opset 23 in the layout of Hugging Face's clients, whose caches grow.

    input_ids, position_ids (B, S), attention_mask (B, P + S)     int64
    past_key_values.i.key, .value (B, K, P, d)                    the caches before
    logits (B, S, V) float32, present.i.key, .value (B, K, L, d)  of all new tokens, and the caches after

A row of a cache whose mask is 0 is padding, wherever it lies: batches may be padded on either side.

B batch, S new tokens, P tokens in the caches, L = P + S, H query heads, K key/value heads, d head size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from export.forms import FORMS, FormOptions
from export.forms.growing import GrowingAttention
from export.tracing import TracedModel, trace
from wm_models.decoder import DecoderWithHead
from wm_models.layers.attention import DMAttention, keep_largest, narrowed

OPSET = 23
MOST_ROWS = 1 << 16  # of a batch


class GrowingContext:
    """One pass: new tokens after those of the caches, with one ONNX operator for each rotation and attention.

    `selects`: whether a sequence may be longer than the keep window.
    """

    def __init__(
        self,
        model: DecoderWithHead,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Sequence[torch.Tensor],
        selects: bool,
    ):
        config = model.config
        self.past, self.keep, self.selects = past, config.keep_window_size, selects
        self.rotation = model.model.rotary_emb(position_ids, position_ids.amax(-1) + 1)
        new, before = position_ids.shape[1], past[0].shape[2]
        # its length has a name of its own among the inputs; here it is known to be P + S
        mask = _operator("Identity", (attention_mask,), {}, torch.int64, (attention_mask.shape[0], before + new))
        rows, steps = torch.arange(before + new), torch.arange(new)
        self.visible = (rows <= (steps + before)[:, None]) & (mask > 0)[:, None, None]  # (B, 1, S, L)
        if config.sliding_window is not None:
            places = (mask.cumsum(-1) - 1)[:, None, None]  # of the keys, without padding
            self.visible = self.visible & (places > position_ids[:, None, :, None] - config.sliding_window)
        self.hidden: torch.Tensor | None = None
        self.written: list[torch.Tensor] = []

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cosine, sine = (table.to(x.dtype) for table in self.rotation)
        return torch.onnx.ops.rotary_embedding(x, cosine, sine)

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        caches = self.past[2 * layer : 2 * layer + 2]
        key, value = (torch.cat(pair, dim=2) for pair in zip(caches, (key, value), strict=True))
        self.written += [key, value]
        return key, value

    def attend_all(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        biases = bias[:, :, None]  # (B, H, 1, L)
        if self.selects:
            mask = narrowed(keep_largest(biases, self.visible, self.keep), query.dtype)
        else:
            if self.hidden is None:  # once for all layers
                self.hidden = torch.where(self.visible, biases.new_zeros(()), torch.finfo(biases.dtype).min)
            mask = biases + self.hidden
        return _operator("Attention", (query, key, value, mask), {"scale": 1.0}, query.dtype, query.shape)


def _operator(
    name: str,
    inputs: tuple[torch.Tensor, ...],
    attributes: dict[str, Any],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
) -> torch.Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)


class GrowingGraph(TracedModel):
    """A language model with its caches as inputs and outputs."""

    def __init__(self, model: DecoderWithHead, selects: bool):
        super().__init__(model, FormOptions(selects=selects), {**FORMS, DMAttention: GrowingAttention})
        self.selects = selects

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        context: Any = GrowingContext(self.model, attention_mask, position_ids, past, self.selects)
        hidden = self.model.model.run(self.model.model.embed_tokens(input_ids), context)[0]
        return (self.model.head(hidden).float(), *context.written)


def lower_growing(model: DecoderWithHead, max_length: int) -> ir.Model:
    """The graph of `model`, whose parameters it takes over, for sequences of at most `max_length` tokens.

    The model's layers are all attention, and none drops a share of its keys.
    """
    config = model.config
    graph = GrowingGraph(model, selects=config.keep_window_size < max_length).eval()
    names = [f"{layer}.{half}" for layer in graph.traced for half in ("key", "value")]
    # Sizes of no meaning, but different from each other and from one, or the trace would take them for constants.
    batch, new, before = 2, 3, 5
    past = [model.head.weight.new_zeros(batch, config.key_value_heads, before, config.head_size) for _ in names]
    positions = torch.arange(new).expand(batch, -1)
    sample = (torch.zeros_like(positions), torch.ones(batch, before + new, dtype=torch.int64), positions)
    rows = torch.export.Dim("batch_size", min=1, max=MOST_ROWS)
    length = torch.export.Dim("sequence_length", min=1, max=max(max_length, new))
    earlier = torch.export.Dim("past_sequence_length", min=0, max=max(max_length, before))
    total = torch.export.Dim("total_sequence_length", min=1, max=2 * max(max_length, before + new))
    shapes = (
        {0: rows, 1: length},
        {0: rows, 1: total},
        {0: rows, 1: length},
        tuple({0: rows, 2: earlier} for _ in past),
    )
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)]
    outputs = ["logits", *(f"present.{name}" for name in names)]
    return trace(graph, (*sample, *past), shapes, inputs, outputs, OPSET)
