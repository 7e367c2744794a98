"""What the machine allows: a model's linear layers alone, and the bytes a decode step cannot do without.

D hidden size, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from .artifact import Artifact
from .memory import use_huge_pages
from .session import session_options, state_bytes

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


def linear_operations(artifact: Artifact, tokens: int) -> int:
    """Floating-point operations of the linear layers over `tokens` tokens, of which the head sees one."""
    config = artifact.read_json("config.json")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    weights = config["num_hidden_layers"] * hidden * (2 * hidden + 2 * narrow + 3 * inner)
    return 2 * (weights * tokens + hidden * config["vocab_size"])


def large_product(threads: int | None, size: int = 1024) -> Callable[[], float]:
    """A function that measures the rate of a float32 product of two square matrices: operations a second."""
    from onnx import TensorProto, helper

    square = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", square[:2], square[2:])
    session = _session(graph, threads)
    feed = dict(zip("ab", np.random.default_rng(0).standard_normal((2, size, size), np.float32), strict=True))

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
    """A function that times the model's linear layers alone, chained in one ONNX graph: seconds a step of `tokens` in
    each of `batch` slots.

    Their weights are random, in float32 or as the artifact's are quantised; the head sees one token a slot. No graph of
    this model can beat that with these kernels; attention, norms and caches come on top.
    """
    from onnx import TensorProto, helper, numpy_helper

    config = artifact.read_json("config.json")
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    bits = {"none": None, "int8": 8, "int4": 4}[artifact.graph.quantization]
    draw, nodes, weights = np.random.default_rng(0), [], []

    def linear(x: str, rows: int, columns: int) -> str:
        name = f"w{len(weights)}"
        if bits is None:
            weights.append(numpy_helper.from_array(draw.standard_normal((rows, columns), np.float32) * 0.03, name))
            nodes.append(helper.make_node("MatMul", [x, name], [f"{name}.out"]))
            return f"{name}.out"
        block = next(size for size in ((32, 16) if bits == 4 else (128, 64, 32, 16)) if rows % size == 0)
        codes = draw.integers(0, 256, (columns, rows // block, block * bits // 8), np.uint8)
        weights.append(numpy_helper.from_array(codes, name))
        weights.append(numpy_helper.from_array(np.full((columns, rows // block), 1e-3, np.float32), f"{name}.scales"))
        sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
        nodes.append(
            helper.make_node("MatMulNBits", [x, name, f"{name}.scales"], [f"{name}.out"], domain=CONTRIB, **sizes)
        )
        return f"{name}.out"

    def join(kind: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"n{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    x = "x"
    for _ in range(config["num_hidden_layers"]):
        query, key, value = linear(x, hidden, hidden), linear(x, hidden, narrow), linear(x, hidden, narrow)
        pair = join("Concat", [key, value], axis=-1)
        attended = join("Add", [query, pair]) if 2 * narrow == hidden else query
        attended = linear(attended, hidden, hidden)
        x = linear(join("Add", [linear(attended, hidden, inner), linear(attended, hidden, inner)]), inner, hidden)
    weights.append(numpy_helper.from_array(np.array([tokens - 1]), "last"))
    y = linear(join("Gather", [x, "last"], axis=1), hidden, vocabulary)
    graph = helper.make_graph(
        nodes, "floor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, tokens, hidden])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [batch, 1, vocabulary])],
        weights,
    )  # fmt: skip
    session = _session(graph, threads)
    feed = {"x": np.ones((batch, tokens, hidden), np.float32)}

    def run() -> float:
        session.run(None, feed)
        started = time.perf_counter()
        for _ in range(steps):
            session.run(None, feed)
        return (time.perf_counter() - started) / steps

    return run


def memory_bandwidth(size: int, threads: int | None) -> float:
    """Bytes/s that a product of one row with a matrix of `size` bytes reads, the fastest of several."""
    from onnx import TensorProto, helper

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
    from onnx import helper

    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])
    use_huge_pages()
    return session
