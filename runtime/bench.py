"""Measure an artifact: prefill, decode, memory; beside the floor of its linear layers and beside rivals.

D hidden size, V vocabulary.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from .artifact import Artifact
from .engine import Engine, load
from .errors import RequestError
from .session import OnnxSession

RIVALS = ("transformers", "torch-compile")
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
Result = dict[str, Any]


def measure(
    directory: Path, against: list[str], prompt_length: int, new_tokens: int, rounds: int, threads: int | None,
    batch: int = 1, backend: str = "auto", provider: str = "cpu",
) -> Result:  # fmt: skip
    """Medians over `rounds` of batch 1: tokens/s, seconds, bytes, and the ratios between them; and decoding in `batch`
    slots beside it.

    The floor alternates with the engine, round by round, so a machine that slows down slows both. A rival runs in a
    process of its own, at once afterwards. On a GPU there is no floor, and memory is not measured. Raises
    `RequestError` for lengths that the artifact cannot hold.
    """
    for name in against:
        if name not in RIVALS:
            raise RequestError(f"--against is {name!r}; expected one of {', '.join(RIVALS)}")
    started = time.perf_counter()
    engine = load(directory, backend, provider=provider, threads=threads)
    load_seconds = time.perf_counter() - started
    if min(prompt_length, new_tokens - 1, rounds) < 1 or prompt_length + new_tokens > engine.graph.max_length:
        raise RequestError(
            f"a prompt of {prompt_length} and {new_tokens} new tokens, {rounds} rounds; expected at least 1, 2 and 1, "
            f"and together no more tokens than the capacity, {engine.graph.max_length}"
        )
    if not 1 <= batch <= engine.graph.max_batch:
        raise RequestError(f"--batch is {batch}; expected 1 to {engine.graph.max_batch}, the artifact's slots")
    prompt = np.random.default_rng(0).integers(0, engine.graph.vocabulary, prompt_length)
    on_cpu = isinstance(engine.session, OnnxSession)
    floor = prefill_floor = batch_floor = product = None
    if on_cpu:
        floor = linear_floor(engine.artifact, threads)
        prefill_floor = linear_floor(engine.artifact, threads, tokens=prompt_length, steps=1)
        product = large_product(threads)
        if batch > 1:
            batch_floor = linear_floor(engine.artifact, threads, batch=batch)
    _generate(engine, prompt, new_tokens)  # warms up, as the floors do themselves
    prefills, steps, floors, prefill_floors, batched, batch_floors, rates = [], [], [], [], [], [], []
    for _ in range(rounds):
        prefill, decode = _generate(engine, prompt, new_tokens)
        prefills.append(prefill)
        steps.append(decode)
        if floor is not None and prefill_floor is not None and product is not None:
            floors.append(floor())
            prefill_floors.append(prefill_floor())
            rates.append(product())
        if batch > 1:
            batched.append(_generate(engine, prompt, new_tokens, batch)[1])
        if batch_floor is not None:
            batch_floors.append(batch_floor())
    wholes = [prefill + step * (new_tokens - 1) for prefill, step in zip(prefills, steps, strict=True)]
    result: Result = {
        "artifact": str(directory),
        "device": engine.session.device_name,
        "dtype": engine.graph.dtype,
        "quantization": engine.graph.quantization,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "threads": threads,
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": prompt_length / median(prefills),
        "decode_tokens_per_second": 1 / median(steps),
        "generate_tokens_per_second": new_tokens / median(wholes),
        "weights_bytes": sum(file.size for name, file in engine.artifact.files.items() if name.endswith(".data")),
    }
    if batch > 1:
        result["batch"] = batch
        result["batch_tokens_per_second"] = batch / median(batched)
        result["batch_over_one"] = median(batch * one / all_ for one, all_ in zip(steps, batched, strict=True))
    if on_cpu:
        result["floor_steps_per_second"] = 1 / median(floors)
        result["share_of_floor"] = median(floor / step for floor, step in zip(floors, steps, strict=True))
        result["prefill_share_of_floor"] = median(f / p for f, p in zip(prefill_floors, prefills, strict=True))
        work = linear_operations(engine.artifact, prompt_length)
        result["product_flops"] = median(rates)
        result["prefill_share_of_product"] = median(work / p / r for p, r in zip(prefills, rates, strict=True))
    if batch_floors:
        result["batch_floor_over_one"] = median(batch * f / b for f, b in zip(floors, batch_floors, strict=True))
    del engine, floor, prefill_floor, batch_floor, product
    if on_cpu:
        result["peak_bytes"] = _peak_bytes(directory, prompt_length, threads)
        result["peak_over_weights"] = result["peak_bytes"] / result["weights_bytes"]
    result["rivals"] = {}
    for name in against:
        rate = _rival(name, directory, prompt_length, new_tokens, rounds, threads)
        ratio = result["generate_tokens_per_second"] / rate
        result["rivals"][name] = {
            "generate_tokens_per_second": rate,
            "times_as_fast": ratio,
            "floor_times_as_fast": result["floor_steps_per_second"] / rate,
        }
    return result


def render(result: Result, as_json: bool) -> None:
    """Print what `measure` returned."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = (
        f"{result['artifact']}: {result['dtype']}, quantization {result['quantization']}, batch 1, "
        f"prompt {result['prompt_length']}, "
        f"{result['new_tokens']} new tokens, median of {result['rounds']}"
    )
    table = Table("measure", "value", title=title, title_justify="left")
    table.add_row("load", f"{result['load_seconds']:.2f} s")
    table.add_row("prefill", f"{result['prefill_tokens_per_second']:.0f} tokens/s")
    table.add_row("decode", f"{result['decode_tokens_per_second']:.1f} tokens/s")
    table.add_row("generate, whole", f"{result['generate_tokens_per_second']:.1f} tokens/s")
    if "batch" in result:
        table.add_row(f"decode, batch {result['batch']}", f"{result['batch_tokens_per_second']:.1f} tokens/s")
        table.add_row("times batch 1", f"{result['batch_over_one']:.2f}")
    if "batch_floor_over_one" in result:
        table.add_row("the floor's, likewise", f"{result['batch_floor_over_one']:.2f}")
    table.add_row("weights", f"{result['weights_bytes'] / 1e6:.0f} MB")
    if "share_of_floor" in result:
        table.add_row("floor: linear layers alone", f"{result['floor_steps_per_second']:.1f} steps/s")
        table.add_row("decode as a share of the floor", f"{result['share_of_floor']:.0%}")
        table.add_row("prefill as a share of its floor", f"{result['prefill_share_of_floor']:.0%}")
        table.add_row("large float32 product", f"{result['product_flops'] / 1e9:.0f} GFLOP/s")
        table.add_row("prefill, linear layers alone, of that rate", f"{result['prefill_share_of_product']:.0%}")
        table.add_row("peak memory of a process", f"{result['peak_bytes'] / 1e6:.0f} MB")
        table.add_row("peak memory / weights", f"{result['peak_over_weights']:.2f}")
    for name, rival in result["rivals"].items():
        table.add_row(f"{name}, whole generate", f"{rival['generate_tokens_per_second']:.1f} tokens/s")
        table.add_row(f"times as fast as {name}", f"{rival['times_as_fast']:.2f}")
        table.add_row(f"the floor is times as fast as {name}", f"{rival['floor_times_as_fast']:.2f}")
    Console().print(table)


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
    session = _session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), threads)
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
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)], ir_version=10
    )
    session = _session(model, threads)
    feed = {"x": np.ones((batch, tokens, hidden), np.float32)}

    def run() -> float:
        session.run(None, feed)
        started = time.perf_counter()
        for _ in range(steps):
            session.run(None, feed)
        return (time.perf_counter() - started) / steps

    return run


def _session(model: Any, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _generate(engine: Engine, prompt: np.ndarray, new_tokens: int, batch: int = 1) -> tuple[float, float]:
    """Seconds to the first token, and seconds for each step after it; greedy, with no end-of-sequence."""
    engine.reset()
    started = time.perf_counter()
    engine.reserve(batch, len(prompt) + new_tokens)
    ids = engine.append(np.tile(prompt, (batch, 1)), likeliest=True)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        ids = engine.append(ids[:, None], likeliest=True)
    return first - started, (time.perf_counter() - first) / (new_tokens - 1)


def _peak_bytes(directory: Path, prompt_length: int, threads: int | None) -> int:
    """The largest resident size of a fresh process that loads the artifact and decodes."""
    # VmHWM, because a new process's ru_maxrss begins at its parent's size.
    code = (
        "import re, sys\nfrom runtime import load\n"
        f"engine = load(sys.argv[1], 'onnx', threads={threads!r})\n"
        f"engine.prefill([[0] * {prompt_length}])\nengine.decode([0])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def _rival(name: str, directory: Path, prompt_length: int, new_tokens: int, rounds: int, threads: int | None) -> float:
    """Tokens/s of a rival's whole generation. It needs packages that this one does without, hence the process."""
    numbers = [str(number) for number in (prompt_length, new_tokens, rounds, threads or 0)]
    command = [sys.executable, "-m", "export.rival", name, str(directory), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RequestError(f"--against {name}: it failed: {lines[-1]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["tokens_per_second"])
