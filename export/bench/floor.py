"""What the machine allows, measured: a graph's linear layers alone, a large product, and its memory's bandwidth.

K input features, N output features.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export.bench.cost import Linear, linear_rows
from runtime.artifact.manifest import Artifact
from runtime.backends.ort_cpu import cpu_session

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


def large_product(threads: int | None, size: int = 1024) -> Callable[[], float]:
    """A function that measures the rate of a float32 product with a square weight: operations a second."""
    draw = np.random.default_rng(0)
    inside, outside = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "xy")
    weight = numpy_helper.from_array(draw.standard_normal((size, size), np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])], "product", [inside], [outside], [weight]
    )
    session = _session(graph, threads)
    feed = {"x": draw.standard_normal((size, size), np.float32)}

    def run() -> float:
        session.run(None, feed)
        started = time.perf_counter()
        for _ in range(8):
            session.run(None, feed)
        return 8 * 2 * size**3 / (time.perf_counter() - started)

    return run


def linear_floor(
    artifact: Artifact, threads: int | None, tokens: int = 1, steps: int = 48, batch: int = 1
) -> Callable[[], float]:
    """A function that times the model's linear layers alone: seconds a step of `tokens` in each of `batch` slots.

    They run one after the other in a graph of their own, with random weights, in float32 or as the artifact's are
    quantised. The graph that they come from cannot beat that with these kernels: attention, norms and caches come on
    top.
    """
    step, _ = _products(linear_rows(artifact, tokens), threads, batch)

    def run() -> float:
        step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps

    return run


def _products(layers: Sequence[tuple[Linear, int]], threads: int | None, batch: int) -> tuple[Callable[[], None], int]:
    """A function that computes each layer's product with random weights once, and the bytes of all weights.

    `layers`: with the rows that each sees of each of `batch` slots.
    """
    draw, nodes, weights = np.random.default_rng(0), [], []
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    for (inner, outer, bits, block), rows in layers:
        x, y, weight = f"x.{inner}.{rows}", f"y.{len(nodes)}", f"weight.{len(nodes)}"
        inputs[x], outputs[y] = (batch, rows, inner), (batch, rows, outer)
        if bits is None or block is None:
            values = draw.standard_normal((inner, outer), np.float32) * 0.03
            nodes.append(helper.make_node("MatMul", [x, constant(weight, values)], [y]))
            continue
        codes = constant(weight, draw.integers(0, 256, (outer, inner // block, block * bits // 8), np.uint8))
        scales = constant(f"{weight}.scales", np.full((outer, inner // block), 1e-3, np.float32))
        sizes: dict[str, Any] = {"K": inner, "N": outer, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", [x, codes, scales], [y], domain=CONTRIB, **sizes))
    inside, outside = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    )
    session = _session(helper.make_graph(nodes, "floor", inside, outside, weights), threads)
    binding = session.io_binding()
    for name, shape in inputs.items():
        binding.bind_cpu_input(name, np.ones(shape, np.float32))
    for name in outputs:
        binding.bind_output(name)
    return lambda: session.run_with_iobinding(binding), sum(len(weight.raw_data) for weight in weights)


def memory_bandwidth(size: int, threads: int | None, bits: int | None = None, block: int = 128) -> Callable[[], float]:
    """A function that measures the bytes/s that a product of one row with a matrix of `size` bytes reads.

    It is the fastest of several. The matrix is in float32, or in codes of `bits` with a scale for each `block`.
    """
    inner = 1024
    outer = max(int(size / (inner * (4 if bits is None else bits / 8 + 4 / block))), 1)
    layer = Linear(inner, outer) if bits is None else Linear(inner, outer, bits, block)
    product, read = _products([(layer, 1)], threads, batch=1)
    return lambda: read / _fastest(product, 8)


def operator_seconds(threads: int | None, count: int = 256) -> Callable[[], float]:
    """A function that measures the seconds of an operator whose work is next to nothing, the fastest of several."""
    shape = (1, 1, 64)
    inside, outside = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{count}"))
    nodes = [helper.make_node("Mul", [f"x{index}", "factor"], [f"x{index + 1}"]) for index in range(count)]
    factor = numpy_helper.from_array(np.full(shape, 0.999, np.float32), "factor")
    session = _session(helper.make_graph(nodes, "operators", [inside], [outside], [factor]), threads)
    feed = {"x0": np.ones(shape, np.float32)}
    return lambda: _fastest(lambda: session.run(None, feed), 32) / count


def _fastest(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of so many runs after a first one."""
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _session(graph: Any, threads: int | None) -> Any:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return cpu_session(model, threads)
