"""Measure an artifact: start-up, prefill, decode, memory; beside the floor of its linear layers and beside rivals."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from export.bench.floor import large_product, linear_floor, linear_operations, memory_bandwidth, step_bytes
from runtime.backends.ort_cpu import OnnxSession
from runtime.engine import Engine, load
from runtime.errors import RequestError

RIVALS = ("transformers", "transformers-compiled", "mobius-onnx", "torch-compile")
CONTEXT_STEPS = 16  # decode steps that lead up to each context length
PAUSE = 0.1  # seconds between two measurements: a session's threads go on spinning for a while after its last run
CHUNK = 512  # tokens of a step on the way there
FIRST_PROMPT = 16  # tokens of the prompt whose first token is timed
Result = dict[str, Any]


def measure(
    directory: Path, against: list[str], prompt_length: int, new_tokens: int, rounds: int, threads: int | None,
    batch: int = 1, backend: str = "auto", provider: str = "cpu", by_context: bool = False,
) -> Result:  # fmt: skip
    """Medians over `rounds` of batch 1: tokens/s, seconds, bytes, and the ratios between them; and decoding in `batch`
    slots beside it. With `by_context`, decode tokens/s at contexts up to the capacity, too, and their bandwidth limit.

    The floor alternates with the engine, round by round, so a machine that slows down slows both. A rival runs in a
    process of its own, at once afterwards; one that fails is said to. On a GPU there is no floor, and memory is not
    measured. Raises `RequestError` for lengths that the artifact cannot hold.
    """
    for name in against:
        if name not in RIVALS:
            raise RequestError(f"--against is {name!r}; expected one of {', '.join(RIVALS)}")
    started = time.perf_counter()
    engine = load(directory, backend, provider=provider, threads=threads)
    load_seconds = time.perf_counter() - started
    if engine.labels:
        raise RequestError(f"{directory}: is a classifier, which writes no text; bench measures a language model")
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

    def timed(run: Callable[[], Any]) -> Any:
        time.sleep(PAUSE)
        return run()

    prefills, steps, floors, prefill_floors, batched, batch_floors, rates = [], [], [], [], [], [], []
    for _ in range(rounds):
        prefill, decode = timed(partial(_generate, engine, prompt, new_tokens))
        prefills.append(prefill)
        steps.append(decode)
        if floor is not None and prefill_floor is not None and product is not None:
            floors.append(timed(floor))
            prefill_floors.append(timed(prefill_floor))
            rates.append(timed(product))
        if batch > 1:
            batched.append(timed(partial(_generate, engine, prompt, new_tokens, batch))[1])
        if batch_floor is not None:
            batch_floors.append(timed(batch_floor))
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
    contexts = _contexts(engine.graph.max_length) if by_context else []
    if by_context:
        result["contexts"] = {context: 1 / _context_seconds(engine, context) for context in contexts}
    if by_context and on_cpu:
        bytes_ = {context: step_bytes(engine.artifact, context) for context in contexts}
        result["bandwidth"] = bandwidth = memory_bandwidth(bytes_[contexts[0]], threads)
        result["bandwidth_limits"] = {context: bandwidth / count for context, count in bytes_.items()}
    capacity = next(size for size in engine.graph.capacities if size >= max(prompt_length + new_tokens, *contexts, 0))
    del engine, floor, prefill_floor, batch_floor, product
    if on_cpu:
        result |= _fresh_process(directory, prompt_length, threads)
        result["peak_over_weights"] = result["peak_bytes"] / result["weights_bytes"]
    request = {
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "threads": threads or 0,
        "capacity": capacity,
        "contexts": contexts,
        "context_steps": CONTEXT_STEPS,
    }
    result["rivals"] = {name: _beside(result, _rival(name, directory, request)) for name in against}
    return result


def _generate(engine: Engine, prompt: np.ndarray, new_tokens: int, batch: int = 1) -> tuple[float, float]:
    """Seconds to the first token, and seconds for each step after it; greedy, with no end-of-sequence."""
    engine.reset()
    started = time.perf_counter()
    engine.reserve(batch, len(prompt) + new_tokens)
    ids = engine.append(np.tile(prompt, (batch, 1)), argmax=True)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        ids = engine.append(ids[:, None], argmax=True)
    return first - started, (time.perf_counter() - first) / (new_tokens - 1)


def _contexts(max_length: int) -> list[int]:
    """128, doubled up to the capacity, which is the last."""
    sizes = [128 << power for power in range(max_length.bit_length()) if 128 << power < max_length]
    return [*sizes, max_length]


def _context_seconds(engine: Engine, context: int) -> float:
    """The median of the decode steps that lead up to `context` tokens."""
    steps = min(CONTEXT_STEPS, context - 1)
    ids = np.random.default_rng(0).integers(0, engine.graph.vocabulary, (1, context - steps))
    engine.reset()
    engine.reserve(1, context)
    new, times = ids, []
    for start in range(0, ids.shape[1], CHUNK):
        new = engine.append(ids[:, start : start + CHUNK], argmax=True)[:, None]
    for _ in range(steps):
        started = time.perf_counter()
        new = engine.append(new, argmax=True)[:, None]
        times.append(time.perf_counter() - started)
    return median(times)


def _fresh_process(directory: Path, prompt_length: int, threads: int | None) -> Result:
    """A new process's seconds to load and to load and say the first token, and its largest resident size."""
    code = (
        "import sys, time\nfrom runtime import load\nstarted = time.perf_counter()\n"
        f"engine = load(sys.argv[1], 'onnx', threads={threads!r})\nloaded = time.perf_counter() - started\n"
        f"engine.prefill([[0] * {min(FIRST_PROMPT, prompt_length)}])\nfirst = time.perf_counter() - started\n"
        f"engine.reset()\nengine.prefill([[0] * {prompt_length}])\nengine.decode([0])\n"
        "print(loaded, first, open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    loaded, first, status = done.stdout.split(maxsplit=2)
    peak = re.search(r"VmHWM:\s+(\d+)", status)  # not ru_maxrss, which begins at its parent's size
    assert peak
    return {
        "load_seconds": float(loaded),
        "first_token_seconds": float(first),
        "peak_bytes": int(peak[1]) * 1024,
    }


def _rival(name: str, directory: Path, request: dict[str, Any]) -> dict[str, Any]:
    """A rival's seconds, or why it has none. It needs packages that this one does without, hence the process."""
    command = [sys.executable, "-m", "export.bench.baselines", name, str(directory), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _beside(result: Result, rival: dict[str, Any]) -> Result:
    """A rival's rates and the ratios of this engine's to them."""
    if "failed" in rival:
        return rival
    rate = result["new_tokens"] / rival["generate_seconds"]
    ratios = {"times_as_fast": result["generate_tokens_per_second"] / rate}
    if "floor_steps_per_second" in result:
        ratios["floor_times_as_fast"] = result["floor_steps_per_second"] / rate
    return {
        "generate_tokens_per_second": rate,
        "decode_tokens_per_second": 1 / rival["step_seconds"],
        **ratios,
        "contexts": {int(context): 1 / seconds for context, seconds in rival["context_seconds"].items()},
    }
