"""Choose the next token on the device: one more output of the graph.

B batch, S new tokens, V vocabulary.
"""

import numpy as np
import onnx_ir as ir

from export.rewrites.initializer import add_initializer
from runtime.artifact.manifest import NEXT_IDS


def add_next_ids(graph: ir.Graph) -> None:
    """Add the output `next_ids` (B, S), int64: the argmax of each row of the logits (B, S, V).

    It is -1 where a row's logits are not all finite.
    """
    logits = next(value for value in graph.outputs if value.name == "logits")
    last = add_initializer(graph, ir.tensor(np.array([2], np.int64), name="tensorrt.last"))
    negative = add_initializer(graph, ir.tensor(np.array(-1, np.int64), name="tensorrt.none"))
    wide = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    total = ir.node("ReduceSum", [wide.outputs[0], last], {"keepdims": 0})
    missing = ir.node("IsNaN", [total.outputs[0]])
    endless = ir.node("IsInf", [total.outputs[0]])
    broken = ir.node("Or", [missing.outputs[0], endless.outputs[0]])
    best = ir.node("ArgMax", [wide.outputs[0]], {"axis": 2, "keepdims": 0})
    assert logits.shape is not None
    ids = ir.Value(name=NEXT_IDS, shape=ir.Shape(logits.shape[:2]), type=ir.TensorType(ir.DataType.INT64))
    choice = ir.node("Where", [broken.outputs[0], negative, best.outputs[0]], outputs=[ids])
    for node in (wide, total, missing, endless, broken, best, choice):
        node.name = f"tensorrt.{node.op_type.lower()}"
        if not node.outputs[0].name:
            node.outputs[0].name = node.name
        graph.append(node)
    graph.outputs.append(ids)
