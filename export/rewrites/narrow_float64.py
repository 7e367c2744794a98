"""A graph whose biases are computed in float64, for machines that have no float64: TensorRT's.

    Cast(x, float64) MatMul W          Mul(x, Wᵀ) ReduceSum        in float32
    Exp, Add 1, Pow A                  Softplus, Mul A, Exp        in float32

A biased key head's dt is then a sum over the products of one token, whose rounding does not depend on how many tokens
there are: equal tokens have equal biases, as in float64.

B batch, S new tokens, D hidden size, Hm rows of the bias.
"""

import numpy as np
import onnx_ir as ir


def narrow_float64(model: ir.Model) -> ir.Model:
    """Replace all arithmetic in float64; the model is changed in place, and returned."""
    graph = model.graph
    for node in list(graph):
        if any(value.dtype == ir.DataType.DOUBLE for value in node.outputs):
            if node.op_type == "Pow":
                _use_softplus(graph, node)
            elif node.op_type == "MatMul":
                _multiply_and_sum(graph, node)
            elif node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.DOUBLE:
            if value.uses():
                _initialize(value, _numbers(value).astype(np.float32))
            else:
                graph.initializers.pop(value.name or "")
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.DOUBLE:
                value.dtype = ir.DataType.FLOAT
    return model


def _use_softplus(graph: ir.Graph, power: ir.Node) -> None:
    """(1 + exp(dt)) ** A as exp(A · softplus(dt)), which overflows no sooner than its result."""
    total, exponent = power.inputs
    assert total is not None
    add = total.producer()
    assert add is not None
    exp = next(maker for value in add.inputs if value is not None and (maker := value.producer()) is not None)
    softplus = ir.node("Softplus", [exp.inputs[0]], name=f"{power.name}.softplus")
    product = ir.node("Mul", [softplus.outputs[0], exponent], name=f"{power.name}.exponent")
    result = ir.node("Exp", [product.outputs[0]], name=f"{power.name}.bias")
    _replace(graph, power, [softplus, product, result])
    graph.remove([add, exp], safe=True)


def _multiply_and_sum(graph: ir.Graph, product: ir.Node) -> None:
    """x (B, S, D) times a constant (D, Hm) as Σ over D of (B, S, 1, D) · (Hm, D)."""
    x, weight = product.inputs
    assert weight is not None
    turned = _constant(graph, f"{product.name}.transposed", np.ascontiguousarray(_numbers(weight).T.astype(np.float32)))
    before_last = _constant(graph, f"{product.name}.axis", np.array([-2], np.int64))
    last = _constant(graph, f"{product.name}.last", np.array([-1], np.int64))
    wide = ir.node("Unsqueeze", [x, before_last], name=f"{product.name}.wide")
    products = ir.node("Mul", [wide.outputs[0], turned], name=f"{product.name}.products")
    total = ir.node("ReduceSum", [products.outputs[0], last], {"keepdims": 0}, name=f"{product.name}.sum")
    _replace(graph, product, [wide, products, total])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put the nodes `new` in the place of `old`, whose result is the last one's."""
    for node in new:
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.FLOAT)
    new[-1].outputs[0].shape = old.outputs[0].shape
    for key, note in old.metadata_props.items():
        for node in new:
            node.metadata_props[key] = note
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [old.outputs[0]], [new[-1].outputs[0]])


def _constant(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    value = ir.Value(name=name)
    _initialize(value, numbers)
    graph.register_initializer(value)
    return value


def _initialize(value: ir.Value, numbers: np.ndarray) -> None:
    tensor = ir.tensor(numbers, name=value.name)
    value.const_value, value.shape, value.type = tensor, ir.Shape(numbers.shape), ir.TensorType(tensor.dtype)


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
