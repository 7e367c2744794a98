"""The graph's files: the portable graph, the graph for a CPU where that is another, and the weights, each once."""

from pathlib import Path

import onnx_ir as ir

from export.rewrites.cpu_quantized import use_cpu_quantized_operators
from export.rewrites.widen_bfloat16 import widen_bfloat16

GRAPH, CPU_GRAPH, WEIGHTS = "model.onnx", "model.cpu.onnx", "model.onnx.data"


def save_graph(graph: ir.Model, directory: Path, dtype: str, quantization: str = "none") -> None:
    """Write the graph and, beside it in one file, its weights, each once."""
    ir.save(graph, directory / GRAPH, external_data=WEIGHTS, size_threshold_bytes=1024)
    if dtype == "bfloat16":  # ONNX Runtime's CPU kernels know no bfloat16: a second graph over the same weights
        ir.save(widen_bfloat16(ir.load(directory / GRAPH)), directory / CPU_GRAPH)
    elif quantization != "none":
        ir.save(use_cpu_quantized_operators(ir.load(directory / GRAPH)), directory / CPU_GRAPH)
