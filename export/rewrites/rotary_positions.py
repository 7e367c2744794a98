"""Compute the positions of rotary embeddings apart from the positions of the attention mask.

TensorRT-RTX 1.7's compiler crashes on float16 attention where both come from one Range node.
"""

import numpy as np
import onnx_ir as ir

from export.rewrites.initializer import add_initializer


def separate_rotary_positions(graph: ir.Graph, capacity: int) -> None:
    """Copy the nodes between the Range and the cosines and sines, with a slice of a constant in place of the Range.

    `capacity`: the rows of a cache, and so the largest number of positions that the Range gives. The compiler does not
    recognise the slice as the same value.
    """
    angles = [node for node in graph if node.op_type in ("Cos", "Sin")]
    waiting, above = list(angles), set()
    while waiting:
        node = waiting.pop()
        if node not in above:
            above.add(node)
            waiting += [maker for value in node.inputs if value is not None and (maker := value.producer())]
    copies: dict[ir.Value, ir.Value] = {}
    count = add_initializer(graph, ir.tensor(np.arange(capacity, dtype=np.int64), name="tensorrt.positions"))
    zero = add_initializer(graph, ir.tensor(np.array([0], np.int64), name="tensorrt.zero"))
    for node in [node for node in graph if node in above]:
        inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
        new: list[ir.Node] = []
        if node.op_type == "Range":
            end = ir.node("Unsqueeze", [node.inputs[1], zero], name=f"{node.name}.end")
            new = [end, ir.node("Slice", [count, zero, end.outputs[0]], name=f"{node.name}.rotary")]
        elif node in angles:
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
        elif any(value in copies for value in node.inputs if value is not None):
            new = [ir.node(node.op_type, inputs, node.attributes, name=f"{node.name}.rotary")]
        if new:
            for made in new:
                made.outputs[0].name = made.name
            graph.insert_before(node, new)
            copies[node.outputs[0]] = new[-1].outputs[0]
