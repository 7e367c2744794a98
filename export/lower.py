"""What exactly is lowered, and to what: a model's `step` as one ONNX graph of opset 24.

    cache write                TensorScatter        one a cache, in place where one buffer is bound to both ends
    attention, mask added      Attention            grouped heads, one a layer
    rotary positions           RotaryEmbedding      cosines and sines computed once a step
    norms                      RMSNormalization
    q, k, v                    MatMul               one product, the weights side by side

B batch, S new tokens, C cache capacity, D hidden size, H query heads, K key/value heads, d head size, V vocabulary.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset24 as op
from torch import nn
from torch.nn import functional as F

from runtime.artifact.manifest import Window, input_names
from wm_models import DogeConfig, LayerCache
from wm_models.context import StepPass
from wm_models.decoder import DecoderWithHead
from wm_models.layers.attention import DMAttention
from wm_models.layers.experts import ExpertMLP
from wm_models.layers.ssd import SSDMixer, recur, scan_chunks

OPSET = 24


class OnnxPass(StepPass):
    """A step whose cache writes, rotations and attention are one ONNX operator each."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cosine, sine = (table.to(x.dtype) for table in self.rotation)
        return torch.onnx.ops.rotary_embedding(x, cosine, sine)

    def carry(self, layer: int, advance: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return super().carry(layer, partial(advance, by_length=_recur_or_scan))

    def replace(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return new

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return _operator("TensorScatter", (cache, new, self.start), {"axis": 2}, cache)

    def attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return _operator("Attention", (query, key, value, mask), {"scale": 1.0}, query)  # see `fuse_attention`


def _operator(name: str, inputs: tuple[torch.Tensor, ...], attributes: dict[str, Any], like: torch.Tensor) -> Any:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET)


def _recur_or_scan(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both forms of SSD under an If: in a decode step the small nodes of chunks would cost more than their products."""
    inputs = (c, b, x, log_decay, state)

    def one(
        c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        first = (part.narrow(2, 0, 1) for part in (c, b, x, log_decay))
        y, new = recur(*first, state)  # type: ignore[call-arg]
        return _dense(y.expand(-1, -1, x.shape[2], -1)), _dense(new)

    def many(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, new = scan_chunks(*inputs, chunk=chunk)  # type: ignore[call-arg]
        return _dense(y), _dense(new)

    return torch.cond(x.shape[2] == 1, one, many, inputs)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A copy in the order of its dimensions, for what two branches give must have the same strides."""
    return x.clone(memory_format=torch.contiguous_format)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """One node: ONNX's Softplus needs no threshold to stay finite, so torch's Greater and Where go."""
    assert beta == 1.0
    return op.Softplus(x)


class HeadProjection(nn.Module):
    """Linear layers over one input as one product, whose heads are put in front of the tokens once for all."""

    def __init__(self, parts: Sequence[nn.Linear], head_size: int):
        super().__init__()
        self.head_size = head_size
        self.heads = [part.out_features // head_size for part in parts]
        self.weight = _fixed(torch.cat([part.weight for part in parts]))
        biased = parts[0].bias is not None
        self.bias = _fixed(torch.cat([part.bias for part in parts])) if biased else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = F.linear(x, self.weight, self.bias).view(*x.shape[:2], -1, self.head_size).transpose(1, 2)
        return heads.split(self.heads, dim=1)


class AttentionProjection(HeadProjection):
    """Query, key and value as one product.

    dt is a product of its own, over x: dt is linear in the value and the value in x, so its weight on x is a product of
    two (taken in float64). With `repeated` it is repeated for every query head: a row of the mask is then a row of the
    bias cache.
    """

    def __init__(self, attention: DMAttention, repeated: bool):
        value, dt = attention.v_proj, attention.dt_proj
        super().__init__((attention.q_proj, attention.k_proj, value), attention.head_size)
        repeat = self.heads[0] // attention.A.shape[0] if repeated else 1
        self.dt_weight = _fixed((dt.weight.double() @ value.weight.double()).repeat_interleave(repeat, 0), dt.weight)
        self.dt_bias = None
        if dt.bias is not None:
            bias = dt.bias.double() + dt.weight.double() @ value.bias.double()
            self.dt_bias = _fixed(bias.repeat_interleave(repeat), dt.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *super().forward(x), F.linear(x, self.dt_weight, self.dt_bias)


def _fixed(value: torch.Tensor, like: torch.Tensor | None = None) -> nn.Parameter:
    return nn.Parameter(value if like is None else value.to(like.dtype), requires_grad=False)


def fuse_attention(attention: DMAttention, repeated: bool) -> None:
    """Put q, k and v into one product (see `AttentionProjection`), and the scale of the scores into weights.

    ONNX Runtime has a kernel for the product of one query with its keys that takes no factor: a fifth of attention's
    time in a decode step.
    """
    norm, scale = attention.q_norm, attention.head_size**-0.5
    scaled = [norm.weight] if isinstance(norm, nn.RMSNorm) else list(attention.q_proj.parameters())
    for weight in scaled:
        weight.copy_(weight.double() * scale)
    attention.fused = AttentionProjection(attention, repeated)
    attention.project = attention.fused.__call__
    attention.A = _fixed(attention.A.repeat_interleave(attention.fused.dt_weight.shape[0] // attention.A.shape[0]))
    del attention.q_proj, attention.k_proj, attention.v_proj, attention.dt_proj


def fuse_ssd(ssd: SSDMixer) -> None:
    """Put c, b and x into one product."""
    ssd.fused = HeadProjection((ssd.c_proj, ssd.b_proj, ssd.x_proj), ssd.head_size)
    ssd.project_heads = ssd.fused.__call__
    del ssd.c_proj, ssd.b_proj, ssd.x_proj


def unfuse_experts(mlp: ExpertMLP) -> None:
    """Let the chosen experts' rows be gathered, then multiplied: torch's kernels that copy none are not in ONNX."""

    def mix(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        strength = mlp.act_fn((mlp.down_embed(experts) @ x[..., None])[..., 0]) * weights
        return (strength[:, None] @ mlp.up_embed(experts))[:, 0]

    mlp.mix = mix


class StepGraph(nn.Module):
    """`DecoderWithHead.step` with its states flattened, lowered in place: the model handed in is used up."""

    def __init__(self, model: DecoderWithHead, all_logits: bool, drops: bool):
        super().__init__()
        self.model, self.all_logits, self.drops = model, all_logits, drops
        self.kinds = [type(cache) for cache in model.new_caches(1, 1)]
        with torch.no_grad():
            for module in list(model.modules()):
                if isinstance(module, DMAttention):
                    # rows are dropped for a key head as a whole: its bias is there once
                    fuse_attention(module, repeated=not drops)
                elif isinstance(module, SSDMixer):
                    fuse_ssd(module)
                elif isinstance(module, ExpertMLP):
                    unfuse_experts(module)

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        sequence_lengths: torch.Tensor,
        *states: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        rest = iter(states)
        lengths, dropped_lengths = (cache_lengths, sequence_lengths), next(rest) if self.drops else None
        caches = [kind(*(next(rest) for _ in kind._fields)) for kind in self.kinds]
        logits, caches = self.model.step(
            input_ids, *lengths, caches, dropped_lengths, all_logits=self.all_logits, pass_type=OnnxPass
        )
        return (logits, *(state for cache in caches for state in cache))


def state_names(caches: Sequence[LayerCache]) -> list[str]:
    """The states' input names in the graph's order; an output is named as its input, with `.out` behind."""
    return [f"layers.{layer}.{name}" for layer, cache in enumerate(caches) for name in cache._fields]


def cache_window(config: DogeConfig, max_length: int, spare: int) -> Window | None:
    """How few rows of a cache are enough for sequences of `max_length` tokens; None where it takes as many.

    A query reads the w keys with the largest biases, and a key that is once not among them never is again: w rows, and
    `spare` to be filled before the others are taken out. That holds where a key head has one bias for all its query
    heads, and nothing else hides keys; see `StepPass`.
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

    Inputs `input_ids` (B, S), `cache_lengths` (B), `sequence_lengths` (B), with a `window` `dropped_lengths` (B), all
    int64, and the states; outputs `logits` (B, 1, V), or (B, S, V) with `all_logits`, where V is a
    classifier's number of labels, and the states.
    """
    drops, max_length = window is not None, window.rows if window else max_length
    graph = StepGraph(model, all_logits, drops).eval()
    # Sizes of no meaning, but different from each other and from one, or the trace would take them for constants.
    caches, roomier = model.new_caches(2, 7), model.new_caches(2, 8)
    names = state_names(caches)
    states = [state for cache in caches for state in cache]
    length = 2 * getattr(model.config, "ssd_chunk_size", 1) + 1  # and more than one chunk
    sample = (torch.zeros(2, length, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([length, 2]))
    dropped = [torch.tensor([0, 3])] if drops else []
    batch = torch.export.Dim("batch", min=1, max=max(max_batch, 2))
    sequence = torch.export.Dim("sequence", min=1, max=max(max_length, 2))
    capacity = torch.export.Dim("capacity", min=2, max=max(max_length, 2))
    growing = [  # the dimensions that a larger capacity makes larger
        {at: capacity for at in range(state.ndim) if state.shape[at] != larger.shape[at]}
        for state, larger in zip(states, (state for cache in roomier for state in cache), strict=True)
    ]
    rest = [{0: batch} for _ in dropped] + [{0: batch, **dims} for dims in growing]
    shapes = ({0: batch, 1: sequence}, {0: batch}, {0: batch}, tuple(rest))
    # The exporter speaks of names of dimensions that it unifies, and of a torchvision that nobody here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (*sample, *dropped, *states),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[*input_names(window), *names],
            output_names=["logits", *(f"{name}.out" for name in names)],
            custom_translation_table={torch.ops.aten.softplus.default: _softplus},
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def widen(model: ir.Model) -> ir.Model:
    """The same graph for machines whose kernels know no bfloat16: each node computes in float32, in place.

    Every bfloat16 input is cast up and every result is rounded back, so values are bfloat16 wherever they were.
    """
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        narrow = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.BFLOAT16]
        if not narrow or node.op_type == "Cast":
            continue
        for index in narrow:
            value = node.inputs[index]
            up = _cast(value, ir.Value(name=f"{value.name}.for.{node.name}.{index}"), ir.DataType.FLOAT)  # type: ignore[union-attr]
            graph.insert_before(node, up)
            node.replace_input_with(index, up.outputs[0])
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                rounded = ir.Value(name=value.name)
                ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
                value.name, value.dtype = f"{value.name}.float32", ir.DataType.FLOAT
                graph.insert_after(node, _cast(value, rounded, ir.DataType.BFLOAT16))
    return model


def _cast(value: ir.Value | None, result: ir.Value, dtype: ir.DataType) -> ir.Node:
    assert value is not None
    result.shape, result.type = value.shape, ir.TensorType(dtype)
    return ir.node("Cast", [value], {"to": dtype}, outputs=[result])
