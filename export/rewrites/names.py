"""Name nodes and values after the modules that they come from, so that a graph reads as the model does.

    node and its value    layers.3.self_attn.attention        the module's path, then the operator
    parameter             layers.3.input_layernorm.weight     as in the model
    fused weight          layers.3.self_attn.matmul.weight    the node that reads it, then what it is to the node
    small constant        constant.1                          its value, where several nodes read it

A name that is taken gets a number. Inputs and outputs of the graph keep the names of its contract.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

MODULE = "module"  # a node's metadata: the path in the model of the module that it comes from
SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter's metadata: the modules around a node, then the node
WRAPPER = "model."  # the exported graph calls the model so, and the model its decoder
PLACEHOLDER = "_empty_nn_module_stack_from_metadata_hook"  # torch's, for nodes that a rewrite of its own made
LARGEST_SHOWN = 4  # elements of a constant whose value is its name


def name_by_module(model: ir.Model) -> None:
    """Rename in place, and leave each node's module in its metadata, in the place of the exporter's own notes."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in graph.inputs:
        value.metadata_props.clear()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    _Names(kept, model.opset_imports[""]).name_graph(graph, "")


class _Names:
    def __init__(self, kept: set[int], opset: int):
        self.kept, self.opset = kept, opset
        self.nodes: Counter[str] = Counter()
        self.values: Counter[str] = Counter()

    def name_graph(self, graph: ir.Graph, around: str) -> None:
        """Name what a graph holds; `around`: the name of the node whose branch it is, or ""."""
        for node in graph:
            module = _module(node) or _neighbour(node)
            operator = _words(node.op_type)
            inside = "" if module == WRAPPER[:-1] else module.removeprefix(WRAPPER)
            path = ".".join(part for part in (around or inside, operator) if part)
            node.name = _free(self.nodes, path)
            node.metadata_props.clear()
            if module:
                node.metadata_props[MODULE] = module
            for index, value in enumerate(node.outputs):
                value.metadata_props.clear()
                if id(value) not in self.kept:
                    name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"
                    value.name = _free(self.values, name)
            for name, branch in _branches(node):
                branch.name = f"{node.name}.{name}"
                self.name_graph(branch, branch.name)
        for value in list(graph.initializers.values()):
            value.metadata_props.clear()
            name = _free(self.values, self._constant_name(value))
            if name != value.name:
                del graph.initializers[value.name or ""]
                value.name = name
                graph.register_initializer(value)

    def _constant_name(self, value: ir.Value) -> str:
        name, tensor = value.name or "", value.const_value
        if name.startswith(WRAPPER):
            return name.removeprefix(WRAPPER).removeprefix(WRAPPER)
        uses = list(value.uses())
        assert tensor is not None
        if len(uses) > 1 and tensor.size <= LARGEST_SHOWN:
            return "_".join(["constant", *(str(each) for each in np.atleast_1d(tensor.numpy()).ravel())])
        node, index = uses[0]
        return f"{node.name}.{self._role(node, index)}"

    def _role(self, node: ir.Node, index: int) -> str:
        """What the operator calls its input of this number."""
        if node.op_type == "MatMul":
            return "weight"
        formal = onnx.defs.get_schema(node.op_type, self.opset, node.domain).inputs
        return formal[min(index, len(formal) - 1)].name.lower()


def _free(taken: Counter[str], name: str) -> str:
    taken[name] += 1
    if taken[name] == 1:
        return name
    return _free(taken, f"{name}_{taken[name]}")


def _words(operator: str) -> str:
    """MatMul -> matmul, RMSNormalization -> rms_normalization, TensorScatter -> tensor_scatter."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z]+|[A-Z]+|\d+", operator)
    return "_".join(part.lower() for part in parts) if operator != "MatMul" else "matmul"


def _module(node: ir.Node) -> str:
    """The path in the model of the module that a node comes from, or "" where the exporter noted none."""
    if MODULE in node.metadata_props:
        return node.metadata_props[MODULE]
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]
    paths = [scope for scope in scopes if scope and PLACEHOLDER not in scope]
    return paths[-1].removeprefix(WRAPPER) if paths else ""


def _neighbour(node: ir.Node) -> str:
    """The module of the first node that this one reads: a rewrite of the exporter's notes none for what it makes."""
    makers = [value.producer() for value in node.inputs if value is not None]
    return next((maker.metadata_props.get(MODULE, "") for maker in makers if maker is not None), "")


def _branches(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name.removesuffix("_branch"), attribute.as_graph()
