"""The graph's files: the portable graph, the graph for a CPU where that is another, and the weights, each once."""

import ast
from pathlib import Path

import onnx_ir as ir

from export.rewrites.cpu_quantized import use_cpu_quantized_operators
from export.rewrites.widen_bfloat16 import widen_bfloat16

GRAPH, CPU_GRAPH, WEIGHTS = "model.onnx", "model.cpu.onnx", "model.onnx.data"
MODULE = "module"  # a node's metadata: which module of the model it comes from


def save_graph(graph: ir.Model, directory: Path, dtype: str, quantization: str = "none") -> None:
    """Write the graph and, beside it in one file, its weights, each once.

    What the exporter notes of its own is left out: the places in the sources, with the paths of this machine. Of a
    node only its module in the model stays, so that whoever refuses the node can say where it comes from.
    """
    graph.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.graph:
        module = _module_path(node)
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE] = module
        for value in node.outputs:
            value.metadata_props.clear()
    ir.save(graph, directory / GRAPH, external_data=WEIGHTS, size_threshold_bytes=1024)
    if dtype == "bfloat16":  # ONNX Runtime's CPU kernels know no bfloat16: a second graph over the same weights
        ir.save(widen_bfloat16(ir.load(directory / GRAPH)), directory / CPU_GRAPH)
    elif quantization != "none":
        ir.save(use_cpu_quantized_operators(ir.load(directory / GRAPH)), directory / CPU_GRAPH)


def _module_path(node: ir.Node) -> str:
    """The path in the model of the module that a node comes from, as the exporter noted it, or ""."""
    scopes = [
        scope for scope in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[:-1] if scope
    ]
    return scopes[-1].removeprefix("model.") if scopes else ""  # the step graph calls the whole model `model`
