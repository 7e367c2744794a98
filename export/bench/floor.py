"""What the machine allows: a graph's linear layers alone, and the bytes a decode step cannot do without.

K input features, N output features.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.artifact.manifest import Artifact
from runtime.backends.arrays import state_bytes
from runtime.backends.ort_cpu import cpu_session

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


class Linear(NamedTuple):
    """A product with a constant weight (K, N): in float, or in codes of `bits` with a scale for each `block` of a K."""

    inner: int
    outer: int
    bits: int | None = None
    block: int | None = None


def linear_layers(artifact: Artifact) -> list[Linear]:
    """Those of the graph that runs on a CPU, in its order; the last is the head."""
    graph = onnx.load(artifact.path / artifact.graph.cpu_file, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            found.append(Linear(sizes["K"], sizes["N"], sizes["bits"], sizes["block_size"]))
        elif node.op_type == "MatMul":
            name, turned = node.input[1], False
            while name in producers and producers[name].op_type in ("Transpose", "Cast"):
                turned ^= producers[name].op_type == "Transpose"
                name = producers[name].input[0]
            if len(shapes.get(name, ())) == 2:
                inner, outer = reversed(shapes[name]) if turned else shapes[name]
                found.append(Linear(inner, outer))
    return found


def linear_operations(artifact: Artifact, tokens: int) -> int:
    """Floating-point operations of the linear layers over `tokens` tokens."""
    return sum(2 * rows * each.inner * each.outer for each, rows in _with_rows(artifact, tokens))


def _with_rows(artifact: Artifact, tokens: int) -> list[tuple[Linear, int]]:
    """Each linear layer and how many of the tokens it sees: the head, where that is the graph's choice, one."""
    *layers, head = linear_layers(artifact)
    return [*((each, tokens) for each in layers), (head, 1 if artifact.graph.logits == "last" else tokens)]


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
    draw, nodes, weights = np.random.default_rng(0), [], []
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    for (inner, outer, bits, block), rows in _with_rows(artifact, tokens):
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

    def run() -> float:
        session.run_with_iobinding(binding)
        started = time.perf_counter()
        for _ in range(steps):
            session.run_with_iobinding(binding)
        return (time.perf_counter() - started) / steps

    return run


def memory_bandwidth(size: int, threads: int | None) -> float:
    """Bytes/s that a product of one row with a matrix of `size` bytes reads, the fastest of several."""
    rows = 1024
    columns = max(size // (4 * rows), 1)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "bandwidth",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows]),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, [rows, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
    )  # fmt: skip
    session = _session(graph, threads)
    feed = {"x": np.ones((1, rows), np.float32), "w": np.ones((rows, columns), np.float32)}
    times = []
    for _ in range(8):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    return 4 * rows * columns / min(times)


def step_bytes(artifact: Artifact, context: int) -> int:
    """What a decode step of one sequence of `context` tokens must read: weights, keys and values, and states.

    Of tables only rows are read: of the experts', and of an embedding that is not the head too.
    """
    config, graph = artifact.read_json("config.json"), artifact.graph
    weights = sum(file.size for name, file in artifact.files.items() if name.endswith(".data"))
    width = {"int8": 1, "int4": 0.5}.get(graph.quantization, 4 if graph.dtype == "float32" else 2)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    if not config.get("tie_word_embeddings"):
        weights -= int(graph.vocabulary * hidden * width)
    if config.get("is_moe"):
        weights -= int(2 * layers * (config["num_experts"] - config["num_experts_per_tok"]) * hidden * width)
    kept = min(context, config.get("keep_window_size", context))
    states = 0
    for state in graph.states:
        rows = graph.rows(context) if state.shape[-1] == 1 else kept  # biases are read to choose by
        size = state_bytes(state, 1, rows)
        states += size if "capacity" in state.shape else 2 * size  # a state is written anew
    return weights + states


def _session(graph: Any, threads: int | None) -> Any:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return cpu_session(model, threads)
