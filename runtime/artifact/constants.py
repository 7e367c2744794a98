"""What a graph would compute from constants alone, which ONNX Runtime does while it loads and nothing can stop.

Exports reorder, convert and fill a few constants. A graph that multiplies large ones, or fills memory from a number in
it, has no use but to occupy the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from runtime.artifact.protobuf import OnnxFormatError

# Operators whose output has as many elements as their first input, or at most as many as the product of all.
REORDERING = ("Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear", "Shape")
ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Sin", "Cos", "Sqrt", "Reciprocal", "Sigmoid", "Softplus", "Clip",
    "Min", "Max", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Where",
    "BitwiseXor", "BitwiseAnd", "BitwiseOr", "BitShift",
)  # fmt: skip
TIMES, SMALL = 16, 1 << 24  # at most so many elements for one of the initializers', and so many more


@dataclass(frozen=True)
class Node:
    """An operator and what it reads and writes. `elements` are those of the tensors among its attributes."""

    domain: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    elements: int


def check_constants(
    nodes: Sequence[Node], inputs: set[str], initializers: Mapping[str, int], integers: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `OnnxFormatError` where constants alone would make more elements than a few times the initializers'.

    `nodes` in the graph's order; `inputs` by name; the elements of the initializers; the values of those of integers,
    where they are few.
    """
    elements = dict(initializers)  # of every value that is constant
    known = {"", *elements, *inputs}
    most = TIMES * sum(elements.values()) + SMALL
    made = 0
    for node in nodes:
        if missing := [name for name in node.inputs if name not in known]:
            raise OnnxFormatError(
                f"its operator {node.type!r} reads {missing[0][:60]!r}, which nothing before it writes"
            )
        known.update(node.outputs)
        if not all(name in elements or not name for name in node.inputs):
            continue
        size = _elements(node, elements, integers)
        made += size
        if made > most:
            raise OnnxFormatError(
                f"its operator {node.type!r} makes {size} elements of constants; expected at most {most} of all"
            )
        elements.update(dict.fromkeys(node.outputs, size))


def _elements(node: Node, elements: Mapping[str, int], integers: Mapping[str, tuple[int, ...]]) -> int:
    """How many elements a node makes of constants, or more."""
    sizes = [elements[name] for name in node.inputs if name]
    if node.type in REORDERING and sizes:
        return sizes[0]
    if node.type in ELEMENTWISE and sizes:
        return prod(max(size, 1) for size in sizes)
    if node.type == "Constant":
        return max(node.elements, 1)
    if node.type == "ConstantOfShape" and node.inputs[0] in integers:
        return prod(max(size, 0) for size in integers[node.inputs[0]])
    if node.type == "If":
        return max(sizes, default=1)  # what its branches make is counted there
    raise OnnxFormatError(f"its operator {node.type!r} computes with constants alone, which no export does")
