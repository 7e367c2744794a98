"""What the machine allows, measured: a graph's linear layers alone, a large product, and its memory's bandwidth.

K input features, N output features.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export.bench.cost import Linear, linear_rows
from runtime.artifact.manifest import Artifact, State
from runtime.backends.ort_cpu import cpu_session

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
LARGER_THAN_CACHES = 1 << 27  # bytes
Clock = Callable[[], float]


def large_product(threads: int | None, size: int = 1024, clock: Clock = time.perf_counter) -> Callable[[], float]:
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
        started = clock()
        for _ in range(8):
            session.run(None, feed)
        return 8 * 2 * size**3 / (clock() - started)

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


def memory_bandwidth(
    size: int, threads: int | None, bits: int | None = None, block: int = 128, clock: Clock = time.perf_counter
) -> Callable[[], float]:
    """A function that measures the bytes/s that a product of one row with a matrix of `size` bytes reads.

    It is the fastest of several. The matrix is in float32, or in codes of `bits` with a scale for each `block`. `clock`
    gives seconds; `time.thread_time` is for one thread, where other work shares the machine.
    """
    inner = 1024
    outer = max(int(size / (inner * (4 if bits is None else bits / 8 + 4 / block))), 1)
    layer = Linear(inner, outer) if bits is None else Linear(inner, outer, bits, block)
    product, read = _products([(layer, 1)], threads, batch=1)
    return lambda: read / _fastest(product, 8, clock)


def attention_bandwidth(
    key: State, heads: int, rows: int, threads: int | None, clock: Clock = time.perf_counter
) -> Callable[[], float]:
    """A function that measures the bytes/s of keys, values and biases that attention of one query reads.

    `key`: a float32 cache of keys, of which there are `rows`. So many layers follow one another that no cache of the
    processor holds their keys. It is the fastest of several.
    """
    _, groups, _, size = key.sized(1, rows)
    cache, query = (1, groups, rows, size), (1, heads, 1, size)
    read = 4 * rows * (2 * groups * size + heads)
    shapes, nodes = {"query0": query, "hidden": (1, 1, 1, rows)}, []
    for layer in range(LARGER_THAN_CACHES // read + 1):
        shapes |= {f"key{layer}": cache, f"value{layer}": cache, f"bias{layer}": (1, heads, rows, 1)}
        inputs = [f"query{layer}", f"key{layer}", f"value{layer}", f"mask{layer}"]
        nodes += [
            helper.make_node("Transpose", [f"bias{layer}"], [f"turned{layer}"], perm=[0, 1, 3, 2]),
            helper.make_node("Add", [f"turned{layer}", "hidden"], [f"mask{layer}"]),
            helper.make_node("Attention", inputs, [f"query{layer + 1}"], scale=1.0),
        ]
    inside = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outside = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, query)]
    session = _session(helper.make_graph(nodes, "attention", inside, outside), threads)
    draw = np.random.default_rng(0)
    feed = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return lambda: read * (len(nodes) // 3) / _fastest(lambda: session.run(None, feed), 4, clock)


def _fastest(run: Callable[[], object], times: int, clock: Clock) -> float:
    """Seconds of the fastest of so many runs after a first one."""
    run()
    seconds = []
    for _ in range(times):
        started = clock()
        run()
        seconds.append(clock() - started)
    return min(seconds)


def _session(graph: Any, threads: int | None) -> Any:
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return cpu_session(model, threads)
