"""A constant of a graph: what every pass that adds one goes through."""

import onnx_ir as ir


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor` as a constant of the graph under the tensor's own name; returns the graph's value for it."""
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
