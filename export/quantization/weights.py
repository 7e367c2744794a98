"""Weight-only quantisation of a lowered graph: blocks of integers, one scale each.

A weight W (N, K) becomes codes q (N, K) and scales s (N, K / block), W ≈ s·q, symmetric, so there are no zero points.

    model.onnx      DequantizeLinear, then what was there: Gather, or Transpose and MatMul
    model.cpu.onnx  ONNX Runtime's own MatMulNBits, and look-ups that widen a few rows, over the same bytes

A table that is both embedding and head is quantised and stored once.
N output features or rows, K input features, B batch, S tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from export.progress import SILENT, Progress
from export.quantization.schemes import BLOCKS, Scheme, Weight
from export.quantization.workers import one_thread_each
from export.rewrites.initializer import add_initializer
from export.rewrites.names import MODULE
from runtime.host.memory import release

ELEMENTS = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
FEWEST_ROWS = 32  # smaller weights, such as the bias's dt, matter to quality and not to size


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

    def stored(self) -> np.ndarray:
        """The weight in the graph's file, which is mapped."""
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()

    def matrix(self) -> np.ndarray:
        """(N, K), float32: a copy."""
        value = self.stored().astype(np.float32)
        return np.ascontiguousarray(value.T) if self.transposed else value


def block_size(columns: int, largest: int) -> int:
    """Weights to a scale in a matrix of this many columns: `largest`, or the next smaller block that divides them."""
    return next(size for size in BLOCKS if size <= largest and columns % size == 0)


def is_quantizable(rows: int, columns: int) -> bool:
    """Whether a weight (rows, columns) has enough rows, and columns that divide into blocks."""
    return rows >= FEWEST_ROWS and columns % BLOCKS[-1] == 0


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
        if is_quantizable(rows, columns):
            yield use


def activations(graph: ir.Model) -> list[str]:
    """The names of the values that the weights to quantise are multiplied with."""
    return sorted({use.activation for use in quantizable(graph) if use.activation})


def quantize_graph(
    path: Path, scheme: Scheme, largest: int, moments: Mapping[str, torch.Tensor], progress: Progress = SILENT
) -> ir.Model:
    """The float32 graph in the file `path` with its large weights quantised.

    `largest`: weights to a scale at most. `moments`: of a scheme that calibrates, the second moments (K, K) of the
    graph's `activations` on text of the kind that the model will read, by name.
    """
    graph = ir.load(path)
    uses = list(quantizable(graph))
    progress.stage("quantising", total=len(uses))

    def rounded(group: tuple[tuple[str | None, int, bool], list[Use]]) -> list[tuple[np.ndarray, np.ndarray]]:
        (name, block, looked_up), members = group
        matrices = [torch.from_numpy(use.matrix()) for use in members]
        known = moments.get(name) if name else None
        codes, scales = scheme.round(Weight(torch.cat(matrices), block, known, looked_up))
        rows = [len(matrix) for matrix in matrices]
        return [(q.numpy(), s.numpy()) for q, s in zip(codes.char().split(rows), scales.split(rows), strict=True)]

    groups = _alike(uses, scheme, largest)
    with one_thread_each() as workers:
        for members, found in zip(groups.values(), workers.map(rounded, groups.items()), strict=True):
            for use, (codes, scales) in zip(members, found, strict=True):
                release(use.stored())  # nothing reads the float weight again
                _replace(graph, use, codes, scales, scheme.bits)
            progress.advance(len(members))
    return graph


def _alike(uses: list[Use], scheme: Scheme, largest: int) -> dict[tuple[str | None, int, bool], list[Use]]:
    """The weights that are rounded as one: those with the same input, by its name, block, and whether looked up."""
    groups: dict[tuple[str | None, int, bool], list[Use]] = {}
    for use in uses:
        assert use.weight.shape is not None
        columns = use.weight.shape.numpy()[0 if use.transposed else 1]
        block = block_size(columns, min(largest, scheme.block) if use.looked_up else largest)
        groups.setdefault((use.activation, block, use.looked_up), []).append(use)
    return groups


def _replace(graph: ir.Model, use: Use, codes: np.ndarray, scales: np.ndarray, bits: int) -> None:
    """Put a DequantizeLinear over codes (N, K), int8, and scales (N, K / block) in the place of the weight."""
    name = use.weight.name or ""
    block = codes.shape[1] // scales.shape[1]
    tensor = ir.tensor(codes if bits == 8 else codes.astype(ml_dtypes.int4), ELEMENTS[bits], name=f"{name}.codes")
    stored = [add_initializer(graph.graph, each) for each in (tensor, ir.tensor(scales, name=f"{name}.scales"))]
    whole = ir.node("DequantizeLinear", stored, {"axis": 1, "block_size": block})
    whole.name, whole.outputs[0].name = f"{name.removesuffix('.weight')}.dequantize", f"{name}.float"
    first = min((node for node, _ in use.weight.uses()), key=list(graph.graph).index)
    reader = use.products[0] if use.products else first
    whole.metadata_props[MODULE] = reader.metadata_props.get(MODULE, "")
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
