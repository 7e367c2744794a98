"""A bfloat16 graph for machines whose kernels know no bfloat16."""

import onnx_ir as ir


def widen_bfloat16(model: ir.Model) -> ir.Model:
    """Let each node compute in float32; the model is changed in place, and returned.

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
