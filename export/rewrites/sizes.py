"""From which input a graph reads a size that several of them have."""

import onnx_ir as ir


def read_sizes_of_first_inputs(graph: ir.Graph) -> None:
    """Read each dynamic size from the first of the graph's inputs that has it, in place.

    torch's exporter chooses an input, and its choice depends on how many layers the model has.
    """
    first: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            first.setdefault(str(size), (value, axis))
    for node in graph:
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or not value.is_graph_input() or value.shape is None:
            continue
        axis = node.attributes.get_int("start", 0)
        if node.attributes.get_int("end", len(value.shape)) == axis + 1:
            value, axis = first[str(value.shape[axis])]
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)
