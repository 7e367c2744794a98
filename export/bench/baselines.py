"""Baselines, which users have today, timed: `python -m export.bench.baselines NAME ARTIFACT REQUEST`, JSON in and out.

Weights do not change how long a step takes, so a baseline gets random ones for the artifact's configuration. A run
is greedy, of batch 1, and gives the time of each new token.

B batch, S new tokens, C cache capacity, K key/value heads, d head size.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from export.bench import llama_cpp
from runtime.bench import PYTHON
from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM

Run = Callable[[torch.Tensor, int], list[float]]  # of a prompt (1, S): the seconds each new token took
ADVANCED = "a run is done"  # the line that this program prints after each run that counts
WARM_UP = 2  # runs that do not count: a prompt and a token compile apart, and a CUDA graph is recorded the second time


class Failed(Exception):
    """Why there is nothing to measure, in one line."""


class Clock(BaseStreamer):
    """Notes when the prompt and each token passes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        return np.diff(self.times).tolist()


def transformers_run(directory: Path, capacity: int, threads: int, compiled: bool = False) -> Run:
    """transformers' `generate` with its own Doge in float32; `compiled`: its static cache under torch.compile."""
    model = _transformers_doge(directory)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if compiled:
        compiling = CompileConfig(fullgraph=False, mode="default")  # its Doge cannot be one graph
        compiling._compile_all_devices = True  # type: ignore[assignment]
        options["compile_config"] = compiling

    def run(prompt: torch.Tensor, new_tokens: int) -> list[float]:
        if compiled:
            options["cache"] = transformers.StaticCache(model.config, max_cache_len=capacity)
        clock = Clock()
        model.generate(prompt, max_new_tokens=new_tokens, streamer=clock, **options)  # type: ignore[attr-defined]
        return clock.seconds()

    return run


def compiled_run(directory: Path, capacity: int, threads: int) -> Run:
    """This project's own model under torch.compile with static caches.

    On the GPU where there is one, in the artifact's dtype, each decode step replayed as a CUDA graph.
    """
    graph = json.loads((directory / "manifest.json").read_text())["graph"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hybrid = json.loads((directory / "config.json").read_text())["model_type"] == CheemsConfig.model_type
    config = (CheemsConfig if hybrid else DogeConfig).from_pretrained(directory)
    model = (CheemsForCausalLM if hybrid else DogeForCausalLM)(config).eval()
    model.to(dtype=getattr(torch, graph["dtype"]), device=device)  # type: ignore[call-arg]
    step = torch.compile(model.step, fullgraph=True, mode="reduce-overhead" if device == "cuda" else "default")
    with torch.inference_mode():
        fresh = model.new_caches(1, capacity)
        for cache in fresh:
            for state in cache:
                torch._dynamo.mark_static_address(state)

    @torch.inference_mode()
    def run(prompt: torch.Tensor, new_tokens: int) -> list[float]:
        times, ids, held, caches = [time.perf_counter()], prompt.to(device), 0, fresh
        for _ in range(new_tokens):
            lengths = (torch.tensor([held], device=device), torch.tensor([ids.shape[1]], device=device))
            logits, caches = step(ids, *lengths, caches)
            held += ids.shape[1]
            ids = torch.tensor([[int(logits[0, -1].argmax())]], device=device)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    return run


def mobius_run(directory: Path, capacity: int, threads: int) -> Run:
    """The graph of the package mobius-onnx for a CPU, its caches one buffer each that it writes in place.

    Its Doge computes something else than transformers' (no causal mask, no bias), so this is speed alone.
    """
    if find_spec("mobius") is None:
        raise Failed("not installed: pip install mobius-onnx")
    with TemporaryDirectory() as root:
        _transformers_doge(directory).save_pretrained(f"{root}/checkpoint")
        command = [*PYTHON, "-m", "mobius", "build", "--config", f"{root}/checkpoint", f"{root}/graph"]
        built = subprocess.run([*command, "--ep", "cpu"], capture_output=True, text=True, check=False)
        if built.returncode:
            raise Failed(f"its build failed: {_last_line(built.stderr)}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        path = f"{root}/graph/model.onnx"
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    caches = {value.name: np.zeros((1, value.shape[1], capacity, value.shape[3]), np.float32) for value in pasts}
    vocabulary = session.get_outputs()[0].shape[2]

    def advance(ids: np.ndarray, held: int) -> int:
        binding, length = session.io_binding(), ids.shape[1]
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, held + length), np.int64))
        logits = np.zeros((1, length, vocabulary), np.float32)
        buffers: dict[str, np.ndarray] = {"logits": logits}
        for name, cache in caches.items():
            binding.bind_cpu_input(name, cache)
            buffers[name.replace("past_key_values", "present")] = cache
        for name, buffer in buffers.items():
            binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        session.run_with_iobinding(binding)
        return int(logits[0, -1].argmax())

    def run(prompt: torch.Tensor, new_tokens: int) -> list[float]:
        times, ids, held = [time.perf_counter()], prompt.numpy(), 0
        for _ in range(new_tokens):
            token = advance(ids, held)
            held += ids.shape[1]
            ids = np.array([[token]])
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    return run


def llama_run(directory: Path, capacity: int, threads: int) -> Run:
    """llama.cpp on a Llama of the artifact's sizes and quantisation, see `export.bench.llama_cpp`."""
    try:
        generate = llama_cpp.generator(directory, capacity, threads)
    except llama_cpp.Unfit as error:
        raise Failed(str(error)) from error
    return lambda prompt, new_tokens: generate(prompt[0].tolist(), new_tokens)


def _transformers_doge(directory: Path) -> transformers.DogeForCausalLM:
    values = json.loads((directory / "config.json").read_text())
    if values["model_type"] != transformers.DogeConfig.model_type:
        raise Failed(f"transformers has no {values['model_type']}")
    return transformers.DogeForCausalLM(transformers.DogeConfig.from_pretrained(directory)).float().eval()


BASELINES: dict[str, Callable[[Path, int, int], Run]] = {
    "transformers": transformers_run,
    "transformers-compiled": lambda *arguments: transformers_run(*arguments, compiled=True),
    "mobius-onnx": mobius_run,
    "torch-compile": compiled_run,
    "llama.cpp": llama_run,
}


def measure(name: str, directory: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Medians: seconds of a whole generation, and of a decode step in it and at each of the contexts asked for."""
    threads, (length, new_tokens) = request["threads"], (request["prompt_length"], request["new_tokens"])
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    run = BASELINES[name](directory, request["capacity"], threads)
    steps = request["context_steps"]

    def times(length: int, new_tokens: int, rounds: int) -> list[list[float]]:
        prompt = torch.randint(0, vocabulary, (1, length))
        found = []
        for index in range(rounds + WARM_UP):
            found.append(run(prompt, new_tokens))
            if index >= WARM_UP:
                print(ADVANCED, flush=True)
        return found[WARM_UP:]

    whole = times(length, new_tokens, request["rounds"])
    contexts = {context: times(context - steps, steps + 1, 1)[0] for context in request["contexts"]}
    return {
        "generate_seconds": median(map(sum, whole)),
        "prefill_seconds": median(found[0] for found in whole),
        "step_seconds": median(median(found[1:]) for found in whole),
        "context_seconds": {context: median(found[1:]) for context, found in contexts.items()},
    }


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def main() -> None:
    name, directory, request = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.manual_seed(0)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        answer = measure(name, directory, request)
    except Failed as error:
        answer = {"failed": str(error)}
    except Exception as error:  # a baseline may fail in any way, and the bench goes on
        answer = {"failed": f"{type(error).__name__}: {_last_line(str(error))}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
