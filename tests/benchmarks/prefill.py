"""Prefill of artifacts of one model beside each other, and the products it is made of, by tokens of a prompt.

    python tests/benchmarks/prefill.py engines F32_DIR INT8_DIR INT4_DIR [--lengths 32 128 512]
    python tests/benchmarks/prefill.py products [--inner 768 --outer 1536]

`engines`: tokens a second of CPU time, and times the first artifact's, in interleaved rounds of one thread.

`products`: the same of one linear layer, in GFLOP/s. `codes`: MatMulNBits on activations of int8, as an artifact has
it. `float32 activations`: the same operator without them (accuracy level 1). `widened`: the weights dequantised into
float32 in each run, then a float32 product.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from runtime import load
from runtime.engine import Engine

ROUNDS = 7


def product(inner: int, outer: int, bits: int | None, block: int, way: str) -> onnxruntime.InferenceSession:
    """A session of one product with a constant weight, input `x` (M, inner)."""
    draw = np.random.default_rng(0)
    if way == "widened":
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], axis=0, block_size=block),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ]
        constants = {
            "codes": draw.integers(-128, 127, (inner, outer)).astype(np.int8),
            "scales": np.full((inner // block, outer), 1e-3, np.float32),
        }
    elif bits is None:
        nodes = [helper.make_node("MatMul", ["x", "weight"], ["y"])]
        constants = {"weight": draw.standard_normal((inner, outer), np.float32)}
    else:
        level = {"codes": 4, "float32 activations": 1}[way]
        given = {"K": inner, "N": outer, "bits": bits, "block_size": block, "accuracy_level": level}
        nodes = [helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **given)]
        constants = {
            "codes": draw.integers(0, 256, (outer, inner // block, block * bits // 8), np.uint8),
            "scales": np.full((outer, inner // block), 1e-3, np.float32),
        }
    shapes = {"x": ("M", inner), "y": ("M", outer)}
    inside, outside = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "product", [inside], [outside], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # else ONNX Runtime makes MatMulNBits of them
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


def prefill(engine: Engine, length: int) -> None:
    engine.reset()
    engine.append(np.ones((1, length), np.int64), argmax=True)


def repeat(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], times: int) -> None:
    for _ in range(times):
        session.run(None, feed)


def timed(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds by name, medians of interleaved rounds after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                taken[name].append(time.process_time() - began)
    return {name: median(times) for name, times in taken.items()}


def table(lengths: list[int], rows: dict[str, dict[int, str]]) -> None:
    print("| |", *(f"{length} tokens |" for length in lengths))
    print("| --- |", *("--- |" for _ in lengths))
    for name, cells in rows.items():
        print(f"| {name} |", *(f"{cells[length]} |" for length in lengths))


def engines(directories: list[str], lengths: list[int]) -> dict[str, dict[int, str]]:
    loaded = {directory: load(directory, backend="cpu", threads=1) for directory in directories}
    rows: dict[str, dict[int, str]] = {name: {} for name in loaded}
    for length in lengths:
        runs = {name: partial(prefill, engine, length) for name, engine in loaded.items()}
        seconds = timed(runs)
        for name, each in seconds.items():
            rows[name][length] = f"{length / each:.0f} ({seconds[directories[0]] / each:.2f})"
    return rows


def products(inner: int, outer: int, lengths: list[int]) -> dict[str, dict[int, str]]:
    sessions = {"float32": product(inner, outer, None, 0, "codes")}
    for bits, block in ((8, 128), (4, 32), (4, 128)):
        for way in ("codes", "float32 activations", *(["widened"] if bits == 8 else [])):
            sessions[f"int{bits}, block {block}: {way}"] = product(inner, outer, bits, block, way)
    rows: dict[str, dict[int, str]] = {name: {} for name in sessions}
    for length in lengths:
        feed = {"x": np.random.default_rng(0).standard_normal((length, inner), np.float32)}
        times = 1 + 1024 // length
        runs = {name: partial(repeat, session, feed, times) for name, session in sessions.items()}
        seconds = timed(runs)
        for name, each in seconds.items():
            rate = 2e-9 * times * length * inner * outer / each
            rows[name][length] = f"{rate:.0f} ({seconds['float32'] / each:.2f})"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engines", "products"])
    parser.add_argument("directories", nargs="*")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--outer", type=int, default=1536)
    given = parser.parse_args()
    if given.what == "engines":
        table(given.lengths, engines(given.directories, given.lengths))
    else:
        table(given.lengths, products(given.inner, given.outer, given.lengths))


if __name__ == "__main__":
    main()
