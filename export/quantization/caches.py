"""An int8 key/value cache: new rows are quantised and written, and what is stored is dequantised for Attention.

    new rows ─ QuantizeLinear ─ TensorScatter ─ DequantizeLinear ─ Attention

A key or value x of a head becomes the code q = round(x / s), x ≈ s·q, with a constant scale s for each head of a
layer's keys and of its values: the largest absolute value that the head had on the calibration text, over 127. Larger
values become the largest code. The biases stay floats, since eviction compares them.

One scale for each channel of a head was measured too. It loses more (doge-3m: a mean KL divergence of 7.3e-4 instead of
2.9e-4): a channel goes beyond its own largest value more often than a head does.

B batch (slots), S new tokens, C cache capacity, K key/value heads, d head size.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.progress import SILENT, Progress
from export.quantization.calibration import observe
from export.rewrites.initializer import add_initializer
from export.rewrites.names import MODULE

HEADS = 1  # the axis of K in keys, values and their caches
LARGEST = 127  # code; the scales are symmetric, so -128 stays unused
QUANTISED = (".key", ".value")  # how the states end that become int8


def cache_scales(path: Path, text: np.ndarray, progress: Progress = SILENT) -> dict[str, np.ndarray]:
    """The scales (K), float32, of each key and value state of the float graph in the file `path`, by the state's name.

    `text`: ids (rows, S) of the kind that the model will read.
    """
    graph = ir.load(path)
    rows = {state: scatter.inputs[1] for state, scatter in _scatters(graph).items()}
    names = {state: value.name or "" for state, value in rows.items() if value is not None}
    peaks: dict[str, np.ndarray] = {}
    for found in observe(graph, path.with_name("rows.onnx"), text, list(names.values()), progress=progress):
        for state, name in names.items():
            peak = np.abs(found[name].astype(np.float32)).max(axis=(0, 2, 3))
            peaks[state] = np.maximum(peaks.get(state, 0), peak)
    return {state: np.maximum(peak, 1e-6).astype(np.float32) / LARGEST for state, peak in peaks.items()}


def quantize_caches(graph: ir.Model, scales: Mapping[str, np.ndarray]) -> None:
    """Make the key and value states that have `scales`, see `cache_scales`, int8 in a lowered graph, in place."""
    for state, scatter in _scatters(graph).items():
        if state not in scales:
            continue
        rows, written = scatter.inputs[1], scatter.outputs[0]
        cache = scatter.inputs[0]
        assert rows is not None
        assert rows.dtype is not None
        assert cache is not None
        stored = scales[state].astype(rows.dtype.numpy())
        scale = add_initializer(graph.graph, ir.tensor(stored, name=f"{state}.scale"))
        codes = ir.Value(name=f"{state}.codes", shape=rows.shape, type=ir.TensorType(ir.DataType.INT8))
        whole = ir.Value(name=f"{state}.float", shape=written.shape, type=ir.TensorType(rows.dtype))
        users = list(written.uses())
        module = {MODULE: scatter.metadata_props.get(MODULE, "")}
        quantize = ir.node(
            "QuantizeLinear", [rows, scale], {"axis": HEADS, "output_dtype": ir.DataType.INT8}, outputs=[codes],
            name=f"{state}.quantize", metadata_props=module,
        )  # fmt: skip
        dequantize = ir.node(
            "DequantizeLinear", [written, scale], {"axis": HEADS}, outputs=[whole],
            name=f"{state}.dequantize", metadata_props=module,
        )  # fmt: skip
        graph.graph.insert_before(scatter, quantize)
        graph.graph.insert_after(scatter, dequantize)
        scatter.replace_input_with(1, codes)
        for value in (cache, written):
            value.dtype = ir.DataType.INT8
        for node, index in users:
            node.replace_input_with(index, whole)


def _scatters(graph: ir.Model) -> dict[str, ir.Node]:
    """The nodes that write keys and values, by the name of the state that they write."""
    found = {}
    for node in graph.graph:
        if node.op_type == "TensorScatter":
            cache = node.inputs[0]
            assert cache is not None
            if cache.name is not None and cache.name.endswith(QUANTISED):
                found[cache.name] = node
    return found
