"""Weight-only quantisation of a lowered graph: blocks of 8-bit or 4-bit integers, one scale each.

A weight W (N, K) becomes codes q (N, K) and scales s (N, K / block), W ≈ s·q, symmetric, so there are no zero points.
8 bits round to nearest. 4 bits are chosen so that the products with the weight change least on text that the model
wrote itself, or, of a classifier, on ids drawn at random: column by column, each column's error made good in the
columns after it (GPTQ, arXiv 2210.17323), then scales and codes by turns.

    model.onnx      DequantizeLinear, then what was there: Gather, or Transpose and MatMul
    model.cpu.onnx  ONNX Runtime's own MatMulNBits and GatherBlockQuantized over the same bytes

A table that is both embedding and head is quantised and stored once.
N output features or rows, K input features, B batch, S tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from runtime import Engine
from runtime.artifact.manifest import INPUTS
from runtime.text.sampling import Sampler, Sampling

BITS = {"int8": 8, "int4": 4}
ELEMENTS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
BLOCKS = (128, 64, 32, 16)  # weights to a scale: of those up to a largest, the first that divides K
LARGEST = {8: 128, 4: 32}  # unless asked for; also of a table, whose rows are read as they are too: nothing helps those
FEWEST_ROWS = 32  # smaller weights, such as the bias's dt, matter to quality and not to size
SHRINK = np.linspace(0.6, 1.0, 17)  # of the largest weight in a block: candidates for what the largest code means
DAMPING = 0.01  # of the mean diagonal of the activations' second moments
LOOKED_UP = 0.3  # likewise, for a table whose rows are also embeddings: those must stay near, whatever reads them
ROWS, LENGTH = 64, 128  # of the text that activations are taken from: many beginnings, which lose most
CHUNK, STRIDE = 1024, 32  # rows and columns taken at a time, so that they stay in a core's cache


def written_text(engine: Engine, length: int = 256, seed: int = 0) -> np.ndarray:
    """Ids (B, S), int64, that the model itself writes at temperature 1, each row after a first id drawn at random.

    A classifier writes nothing: all of its ids are drawn.
    """
    rows, sampler = engine.graph.max_batch, Sampler(Sampling(temperature=1.0, seed=seed))
    length, draw = min(length, engine.graph.max_length), np.random.default_rng(seed)
    if engine.labels:
        return draw.integers(0, engine.graph.vocabulary, (rows, length))
    engine.reset()
    engine.reserve(rows, length)
    text = [draw.integers(0, engine.graph.vocabulary, rows)]
    while len(text) < length:
        text.append(sampler(engine.decode(text[-1]), [[]] * rows))
    return np.stack(text, axis=1)


@dataclass(frozen=True)
class Use:
    """A float weight of the graph, and the nodes that read it as rows (Gather) or as a matrix (MatMul)."""

    weight: ir.Value
    transposed: bool  # stored (K, N), as a MatMul reads it
    products: list[ir.Node]
    looked_up: bool = False

    @property
    def activation(self) -> str | None:
        """What the weight is multiplied with; nothing where rows are only looked up.

        Before the head's product one token is chosen: what it is chosen from stands for what it may be.
        """
        if not self.products:
            return None
        x = self.products[0].inputs[0]
        assert x is not None
        chooser = x.producer()
        if chooser is not None and chooser.op_type == "GatherElements" and chooser.inputs[0] is not None:
            x = chooser.inputs[0]
        return x.name

    def matrix(self) -> np.ndarray:
        """(N, K), float32."""
        assert self.weight.const_value is not None
        value = self.weight.const_value.numpy().astype(np.float32)
        return np.ascontiguousarray(value.T) if self.transposed else value


def block_size(columns: int, largest: int) -> int:
    return next(size for size in BLOCKS if size <= largest and columns % size == 0)


def quantizable(graph: ir.Model) -> Iterator[Use]:
    """The weights to quantise: matrices and look-up tables of enough rows whose columns divide into blocks."""
    for weight in graph.graph.initializers.values():
        shape = weight.shape.numpy() if weight.shape is not None and weight.shape.is_static() else ()
        if len(shape) != 2 or weight.dtype != ir.DataType.FLOAT:
            continue
        nodes = [node for node, _ in weight.uses()]
        kinds = {node.op_type for node in nodes}
        if kinds == {"MatMul"} and all(node.inputs[1] is weight for node in nodes):
            use = Use(weight, True, nodes)
        elif kinds <= {"Gather", "Transpose"} and kinds:
            turned = [node.outputs[0] for node in nodes if node.op_type == "Transpose"]
            products = [node for value in turned for node, _ in value.uses()]
            use = Use(weight, False, products, looked_up="Gather" in kinds)
        else:
            continue
        rows, columns = reversed(shape) if use.transposed else shape
        if rows >= FEWEST_ROWS and columns % BLOCKS[-1] == 0:
            yield use


def second_moments(graph: ir.Model, path: Path, text: np.ndarray, names: list[str]) -> dict[str, torch.Tensor]:
    """Σ xᵀx, (K, K) float32, over the tokens of `text` (rows, S), of each of the graph's values `names` (B, S, K).

    The graph is written to `path`, beside its weights, with these values as further outputs.
    """
    values = {out.name: out for node in graph.graph for out in node.outputs}
    outputs, order = list(graph.graph.outputs), sorted(set(names))
    graph.graph.outputs.extend(values[name] for name in order)
    ir.save(graph, path)
    del graph.graph.outputs[len(outputs) :]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    sizes = {"batch": 1, "capacity": text.shape[1]}
    feed = {
        value.name: np.zeros(
            [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()],
            (value.dtype or ir.DataType.FLOAT).numpy(),
        )
        for value in graph.graph.inputs
        if value.name not in INPUTS
    }
    sums = {name: torch.zeros(()) for name in order}
    for row in text:
        steps = (row[None], np.zeros(1, np.int64), np.array([len(row)]))
        found = session.run(order, {**feed, **dict(zip(INPUTS, steps, strict=True))})
        for name, value in zip(order, found, strict=True):
            x = torch.from_numpy(value).flatten(0, -2)
            sums[name] = sums[name] + x.T @ x
    return sums


def scale_search(weight: torch.Tensor, importance: torch.Tensor, largest: int) -> torch.Tensor:
    """The scale of each row of a block (N, block) that loses least, errors weighted by `importance` (block): (N, 1)."""
    peak = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    best, least = peak, torch.full_like(peak, torch.inf)
    for shrink in SHRINK:
        scale = peak * float(shrink)
        rounded = (weight / scale).round().clamp(-largest - 1, largest) * scale
        loss = ((rounded - weight).square() * importance).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def round_to_nearest(weight: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N, K / block) with the largest weight of a block at the largest code."""
    largest = 2 ** (bits - 1) - 1
    blocks = weight.view(weight.shape[0], -1, block)
    scales = blocks.abs().amax(-1).clamp(min=1e-12) / largest
    return (blocks / scales[..., None]).round().clamp(-largest, largest).view_as(weight), scales


def round_with_feedback(
    weight: torch.Tensor, bits: int, block: int, moments: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that keep W·x, for x of these second moments (K, K), rather than W.

    GPTQ finds codes for the scales of `scale_search`; then the scales are fitted to the codes, each code is once more
    set to its best while all others stand, and the scales are fitted again. The larger `damping`, a share of the
    moments' mean diagonal, the nearer W itself is kept.
    """
    moments = moments.double()
    moments += damping * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moments), dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(moments[order][:, order]), upper=True).float()
    importance, lowest, highest = moments.diagonal().float().split(block), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = []
    for rows in weight.split(CHUNK):
        parts = zip(rows.split(block, dim=1), importance, strict=True)
        scales = torch.cat([scale_search(part, weights, highest) for part, weights in parts], dim=1)
        codes = _feed_back(rows, scales.repeat_interleave(block, 1), order, upper, lowest, highest)
        scales = _fitted(rows, codes, scales, moments)
        codes = _descend(rows, codes, scales.repeat_interleave(block, 1), moments.float(), lowest, highest)
        found.append((codes, _fitted(rows, codes, scales, moments)))
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales


def _feed_back(
    weight: torch.Tensor, scales: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """GPTQ: the columns in `order`, those of the largest activations first, each one's error made good in the rest.

    weight, scales and result (N, K); upper (K, K), the Cholesky factor of the ordered moments' inverse.
    """
    weight, scales, codes = weight[:, order], scales[:, order], torch.empty_like(weight)
    for start in range(0, len(order), STRIDE):
        end, errors = min(start + STRIDE, len(order)), []
        for at in range(start, end):
            code = (weight[:, at] / scales[:, at]).round().clamp(lowest, highest)
            codes[:, order[at]] = code
            errors.append((weight[:, at] - code * scales[:, at]) / upper[at, at])
            weight[:, at:end] -= errors[-1][:, None] * upper[at, at:end]
        weight[:, end:] -= torch.stack(errors, dim=1) @ upper[start:end, end:]
    return codes


def _fitted(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The scales (N, K / block) that lose least with these codes (N, K): for each row, one linear system.

    A scale that would leave the range from half to twice its old value stays as it was.
    """
    rows, blocks = scales.shape
    codes = codes.double().view(rows, blocks, -1)
    products = moments.view(blocks, codes.shape[2], blocks, -1)
    system = torch.einsum("nab,abcd,ncd->nac", codes, products, codes)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)  # a row may be all zeros
    system += ridge[:, None, None] * torch.eye(blocks)
    target = (codes * (weight.double() @ moments).view_as(codes)).sum(-1)
    fitted = torch.linalg.solve(system, target).float()
    return torch.where((fitted > scales / 2) & (fitted < scales * 2), fitted, scales)


def _descend(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """Coordinate descent: column by column, the code that loses least given all others. All (N, K)."""
    codes = codes.clone()
    slope = (weight - codes * scales) @ moments  # of the loss, halved and with its sign turned
    for at in range(codes.shape[1]):
        step = slope[:, at] / (moments[at, at] * scales[:, at])
        code = (codes[:, at] + step).round().clamp(lowest, highest)
        slope -= ((code - codes[:, at]) * scales[:, at])[:, None] * moments[at]
        codes[:, at] = code
    return codes


def quantize_graph(directory: Path, file: str, bits: int, largest: int, text: np.ndarray | None) -> ir.Model:
    """The float32 graph `file` of `directory` with its large weights quantised; see the module.

    `largest`: weights to a scale at most. `text`: ids (rows, S) of the kind that the model will read; without it every
    weight is rounded to the nearest.
    """
    graph = ir.load(directory / file)
    uses = list(quantizable(graph))
    moments: dict[str, torch.Tensor] = {}
    if text is not None:
        products = [use.activation for use in uses if use.activation]
        moments = second_moments(graph, directory / "moments.onnx", text, products)
    for use in uses:
        weight = torch.from_numpy(use.matrix())
        block = block_size(weight.shape[1], min(largest, LARGEST[bits]) if use.looked_up else largest)
        if use.activation in moments:
            damping = LOOKED_UP if use.looked_up else DAMPING
            codes, scales = round_with_feedback(weight, bits, block, moments[use.activation], damping)
        else:
            codes, scales = round_to_nearest(weight, bits, block)
        _replace(graph, use, codes.numpy(), scales.numpy(), block, bits)
    return graph


def _replace(graph: ir.Model, use: Use, codes: np.ndarray, scales: np.ndarray, block: int, bits: int) -> None:
    name = use.weight.name or ""
    packed = codes.astype(np.int8)
    tensor = ir.tensor(packed if bits == 8 else packed.astype(ml_dtypes.int4), ELEMENTS[bits], name=f"{name}.codes")
    stored = [_initializer(graph, tensor), _initializer(graph, ir.tensor(scales, name=f"{name}.scales"))]
    whole = ir.node("DequantizeLinear", stored, {"axis": 1, "block_size": block})
    whole.outputs[0].name = f"{name}.float"
    first = min((node for node, _ in use.weight.uses()), key=list(graph.graph).index)
    graph.graph.insert_before(first, whole)
    result = whole.outputs[0]
    if use.transposed:
        turned = ir.node("Transpose", [result], {"perm": [1, 0]})
        turned.outputs[0].name = f"{name}.transposed"
        graph.graph.insert_before(first, turned)
        result = turned.outputs[0]
    for node, index in list(use.weight.uses()):
        if node is not whole:
            node.replace_input_with(index, result)
    del graph.graph.initializers[name]


def _initializer(graph: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.graph.register_initializer(value)
    return value


def specialize(graph: ir.Model) -> ir.Model:
    """The saved quantised graph for ONNX Runtime on a CPU: its own operators over the same bytes of the weights' file.

    They read codes without a sign: 2^(bits-1) more, which is the same bytes with each code's highest bit flipped. ONNX
    Runtime does that once, when it loads the graph.
    """
    flips: dict[int, ir.Value] = {}
    for node in [node for node in graph.graph if node.op_type == "DequantizeLinear"]:
        codes, scales = node.inputs
        assert codes is not None
        assert isinstance(codes.const_value, ir.ExternalTensor)
        stored, block = codes.const_value, node.attributes["block_size"].as_int()
        bits = {kind: bits for bits, kind in ELEMENTS.items()}[stored.dtype]
        rows, columns = stored.shape.numpy()
        if bits not in flips:
            mask = np.array(0x80 if bits == 8 else 0x88, np.uint8)
            flips[bits] = _initializer(graph, ir.tensor(mask, name=f"highest.bit.{bits}"))
        width = block * bits // 8
        signed = ir.ExternalTensor(
            stored.location, stored.offset, stored.length, ir.DataType.UINT8,
            shape=ir.Shape((rows, columns // block, width)), name=f"{codes.name}.bytes", base_dir=stored.base_dir,
        )  # fmt: skip
        flip = ir.node("BitwiseXor", [_initializer(graph, signed), flips[bits]])
        graph.graph.insert_before(node, flip)
        attributes = {"bits": bits, "block_size": block}
        for user, _ in list(node.outputs[0].uses()):
            if user.op_type == "Gather":
                flat = ir.node(
                    "Reshape",
                    [flip.outputs[0], _initializer(graph, ir.tensor([rows, -1], name=f"{codes.name}.rows"))],
                )
                fused = _fused("GatherBlockQuantized", [flat.outputs[0], user.inputs[1], scales], user,
                               {**attributes, "gather_axis": 0, "quantize_axis": 1})  # fmt: skip
                graph.graph.insert_before(user, [flat, fused])
                graph.graph.remove(user, safe=True)
                continue
            for product, _ in list(user.outputs[0].uses()):
                fused = _fused("MatMulNBits", [product.inputs[0], flip.outputs[0], scales], product,
                               {**attributes, "K": columns, "N": rows, "accuracy_level": 4})  # fmt: skip
                graph.graph.insert_before(product, fused)
                graph.graph.remove(product, safe=True)
            graph.graph.remove(user, safe=True)
        graph.graph.remove(node, safe=True)
        del graph.graph.initializers[codes.name or ""]
    graph.opset_imports["com.microsoft"] = 1
    return graph


def _fused(kind: str, inputs: list[ir.Value | None], old: ir.Node, attributes: dict[str, int]) -> ir.Node:
    """A node of ONNX Runtime's own in place of `old`, with its output's name, shape and type."""
    result = ir.Value(name=old.outputs[0].name, shape=old.outputs[0].shape, type=old.outputs[0].type)
    ir.convenience.replace_all_uses_with(old.outputs[0], result, replace_graph_outputs=True)
    return ir.node(kind, inputs, attributes, domain="com.microsoft", outputs=[result])
