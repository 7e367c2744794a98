"""Take the choice of logits out of a step graph, for a runtime that binds no input for it.

B batch, R rows of logits, V vocabulary.
"""

import numpy as np
import onnx_ir as ir

from export.rewrites.initializer import add_initializer
from runtime.artifact.manifest import LOGITS_INDEX

PREFIX = "last_row"


def take_last_row(graph: ir.Graph) -> None:
    """Have `logits` (B, 1, V) be those of each slot's last real token, whose place the input `logits_index` named.

    A graph without that input stays as it is.
    """
    inputs = {value.name: value for value in graph.inputs}
    index = inputs.get(LOGITS_INDEX)
    if index is None:
        return
    one, zero, axis = (
        add_initializer(graph, ir.tensor(np.array(value, np.int64), name=f"{PREFIX}.{name}"))
        for name, value in (("one", 1), ("zero", 0), ("axis", [1]))
    )
    before = ir.node("Sub", [inputs["sequence_lengths"], one])
    last = ir.node("Max", [before.outputs[0], zero])  # an idle slot has no last token
    wide = ir.node("Unsqueeze", [last.outputs[0], axis])
    for node in (before, last, wide):
        node.name = node.outputs[0].name = f"{PREFIX}.{node.op_type.lower()}"
    ir.convenience.replace_all_uses_with(index, wide.outputs[0])
    graph.insert_before(graph[0], [before, last, wide])
    graph.inputs.remove(index)
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
