"""What a decode step reads and computes, counted in an artifact's graph: bytes and operations by module.

These counts have no other home: the floor, the bench's picture and the roofline read them here.

B batch (slots), S new tokens, L keys seen, K input features, N output features, H query heads, d head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import onnx_ir as ir

from export.quantization.schemes import SCHEMES, Scheme
from export.quantization.weights import block_size, is_quantizable
from export.rewrites.names import MODULE
from export.targets.onnx_artifact import DTYPES
from runtime.artifact.manifest import Artifact, State

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
CODES = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
MOVES = {"Transpose", "Cast", "DequantizeLinear", "Reshape", "Unsqueeze"}  # what may stand between a weight and its use
SCALE = 4  # bytes


class Linear(NamedTuple):
    """A product with a constant weight (K, N): in float, or in codes of `bits` with a scale for each `block` of a K."""

    inner: int
    outer: int
    bits: int | None = None
    block: int | None = None


@dataclass(frozen=True)
class Precision:
    """A choice of `--dtype` or `--quantize`: bytes of a float, and the scheme of the large weights or None.

    The weights of biases and RoPE's frequencies, which narrow exports keep in float32, are counted as other floats.
    """

    name: str
    width: int
    scheme: Scheme | None = None

    def matrix_bytes(self, matrix: Linear) -> float:
        """Bytes of a whole weight. Codes in the artifact keep their block, and others have the scheme's."""
        numbers = matrix.inner * matrix.outer
        if self.scheme is None or not is_quantizable(matrix.outer, matrix.inner):
            return numbers * self.width
        block = matrix.block if matrix.bits == self.scheme.bits else None
        block = block or block_size(matrix.inner, self.scheme.block)
        return numbers * (self.scheme.bits / 8 + SCALE / block)


PRECISIONS = {
    **{name: Precision(name, dtype.itemsize) for name, dtype in DTYPES.items()},
    **{name: Precision(name, SCALE, scheme) for name, scheme in SCHEMES.items()},
}


@dataclass
class Part:
    """What one module reads and computes in a decode step, in numbers; `Precision` says how many bytes they are.

    `matrices` are read whole, once for all slots. `vectors`: other constants' numbers, single ones left out. `rows`: a
    table (N rows, K features) and how many of its rows a slot reads. `attention`: operations for each slot and key,
    4·H·d. `products`: operations for each slot of products without a constant.
    """

    module: str
    matrices: list[Linear] = field(default_factory=list)
    vectors: int = 0
    rows: list[tuple[Linear, int]] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    attention: int = 0
    products: int = 0


@dataclass(frozen=True)
class Cost:
    """Bytes that a module reads of weights and of caches, and its operations, in one decode step of all slots."""

    module: str
    weights: float
    caches: float
    operations: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.caches


def graph_parts(artifact: Artifact) -> list[Part]:
    """The parts of the portable graph that read weights or caches, in its order; the last is the head."""
    graph = ir.load(artifact.path / artifact.graph.file).graph
    states = {state.input: state for state in artifact.graph.states}
    parts: dict[str, Part] = {}
    counted: set[int] = set()  # matrices and vectors, by the identity of their value
    for node, module in _step_nodes(graph, ""):
        if node.op_type == "Shape" or _moves_constant(node):
            continue
        part = parts.setdefault(module, Part(module))
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            state = states.pop(value.name or "", None)
            if state is not None:
                part.states.append(state)
            source = _source(value)
            if source.const_value is None or source.dtype not in FLOATS | CODES.keys():
                continue
            if node.op_type == "Gather" and index == 0:
                table = _linear(value, source, rows_first=True)
                part.rows.append((table, _numbers(node.outputs[0]) // table.inner))
            elif node.op_type == "MatMul" and len(source.const_value.shape) == 2:
                part.matrices.append(_linear(value, source))
            elif source.const_value.size > 1 and id(source) not in counted:
                counted.add(id(source))
                part.vectors += source.const_value.size
        if node.op_type == "Attention":
            part.attention += 4 * _numbers(node.inputs[0])
        elif node.op_type == "MatMul" and all(_source(value).const_value is None for value in node.inputs if value):
            first = node.inputs[0]
            assert first is not None
            part.products += 2 * _numbers(node.outputs[0]) * _size(first, -1)
    return [part for part in parts.values() if _reads(part)]


def _reads(part: Part) -> bool:
    return bool(part.matrices or part.vectors or part.rows or part.states or part.products)


def _step_nodes(graph: ir.Graph, around: str) -> Iterator[tuple[ir.Node, str]]:
    """The nodes that a step of one token runs, each with its module: of an If, the branch for one token."""
    for node in graph:
        module = around or node.metadata_props.get(MODULE, "").removeprefix("model.")
        yield node, module
        if node.op_type == "If":
            yield from _step_nodes(node.attributes["then_branch"].as_graph(), module)


def _moves_constant(node: ir.Node) -> bool:
    return node.op_type in MOVES and _source(node.outputs[0]) is not node.outputs[0]


def _source(value: ir.Value) -> ir.Value:
    """The constant that `value` is a copy, a transpose or the floats of; or `value`."""
    producer = value.producer()
    if value.const_value is not None or producer is None or producer.op_type not in MOVES:
        return value
    first = producer.inputs[0]
    assert first is not None
    found = _source(first)
    return found if found.const_value is not None else value


def _linear(value: ir.Value, source: ir.Value, rows_first: bool = False) -> Linear:
    """The weight behind `value`, (K, N) as a MatMul reads it, or a table (N, K) with its `rows_first`."""
    turned, bits, block, at = rows_first, None, None, value
    while at is not source:
        node = at.producer()
        assert node is not None
        if node.op_type == "DequantizeLinear":
            assert source.dtype is not None
            bits, block = CODES[source.dtype], node.attributes["block_size"].as_int()
        turned ^= node.op_type == "Transpose"
        first = node.inputs[0]
        assert first is not None
        at = first
    assert source.const_value is not None
    inner, outer = source.const_value.shape.numpy()
    return Linear(outer, inner, bits, block) if turned else Linear(inner, outer, bits, block)


def _size(value: ir.Value, axis: int) -> int:
    """A dimension's size for one token of one slot."""
    assert value.shape is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else 1


def _numbers(value: ir.Value | None) -> int:
    """How many numbers a value has for one token of one slot."""
    assert value is not None
    assert value.shape is not None
    return prod(_size(value, axis) for axis in range(len(value.shape)))


def own_precision(artifact: Artifact) -> Precision:
    """The artifact's."""
    graph = artifact.graph
    if graph.quantization != "none":
        return PRECISIONS[graph.quantization]
    return next(PRECISIONS[name] for name, dtype in DTYPES.items() if str(dtype).removeprefix("torch.") == graph.dtype)


def step_costs(artifact: Artifact, parts: list[Part], precision: Precision, batch: int, context: int) -> list[Cost]:
    """Of a decode step of `batch` slots that hold `context` tokens each, by module.

    Of keys and values those are read that a model attends to: with a keep window so many. int8 caches have one byte a
    number at every precision. A state without rows is read and written. What is written to caches, activations and
    elementwise operations are left out: they are small.
    """
    kept = min(context, artifact.read_json("config.json").get("keep_window_size", context))
    rows = artifact.graph.rows(context)
    costs = []
    for part in parts:
        weights = sum(map(precision.matrix_bytes, part.matrices)) + part.vectors * precision.width
        for table, read in part.rows:
            weights += precision.matrix_bytes(table) * min(1, batch * read / table.outer)
        caches = sum(_state_numbers(state, kept, rows) * _state_width(state, precision) for state in part.states)
        work = 2 * sum(each.inner * each.outer for each in part.matrices) + part.products + part.attention * kept
        costs.append(Cost(part.module, weights, batch * caches, batch * work))
    return costs


def _state_numbers(state: State, kept: int, rows: int) -> int:
    """What a slot reads, and writes anew, of a state."""
    if "capacity" not in state.shape:
        return 2 * prod(state.sized(1, 1))
    return prod(state.sized(1, rows if state.shape[-1] == 1 else kept))  # biases are all read, to choose by


def _state_width(state: State, precision: Precision) -> int:
    if state.dtype == "int8":
        return 1
    return precision.width if "capacity" in state.shape else 4  # a recurrence's state is float32 always


def step_bytes(artifact: Artifact, context: int) -> int:
    """What a decode step of one sequence of `context` tokens must read, as the artifact is."""
    costs = step_costs(artifact, graph_parts(artifact), own_precision(artifact), 1, context)
    return round(sum(cost.total for cost in costs))


def step_seconds(costs: list[Cost], bandwidth: float, rate: float, cache_bandwidth: float | None = None) -> float:
    """Of a step whose modules follow one another, each as fast as bandwidth and rate let it.

    `bandwidth`: bytes/s; of caches `cache_bandwidth`, where that differs. `rate`: operations/s. What a kernel's launch
    costs is not in it.
    """
    caches = cache_bandwidth or bandwidth
    return sum(max(cost.weights / bandwidth + cost.caches / caches, cost.operations / rate) for cost in costs)


def step_operators(artifact: Artifact) -> int:
    """How many operators a step of one token runs: those of the portable graph that do more than move a constant."""
    graph = ir.load(artifact.path / artifact.graph.file).graph
    return sum(not _moves_constant(node) for node, _ in _step_nodes(graph, ""))


def linear_layers(artifact: Artifact) -> list[Linear]:
    """The graph's products with constant weights, in its order; the last is the head."""
    return [matrix for part in graph_parts(artifact) for matrix in part.matrices]


def linear_rows(artifact: Artifact, tokens: int) -> list[tuple[Linear, int]]:
    """Each linear layer and how many of `tokens` tokens it sees: the head, where that is the graph's choice, one."""
    *layers, head = linear_layers(artifact)
    return [*((each, tokens) for each in layers), (head, 1 if artifact.graph.logits == "last" else tokens)]


def linear_operations(artifact: Artifact, tokens: int) -> int:
    """Floating-point operations of the linear layers over `tokens` tokens."""
    return sum(2 * rows * each.inner * each.outer for each, rows in linear_rows(artifact, tokens))
