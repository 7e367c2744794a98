"""A long context, kept to a window: decode beside positions and beside transformers, and prefill in chunks.

python tests/benchmarks/context.py [--preset doge-60m] [--length 16384] [--threads 2]

Milliseconds a token of greedy generation from each position on, by an artifact of that length whose keep window is the
preset's, and by transformers' own Doge over a cache of that many keys; random weights, float32, batch 1, each in a
process of its own. Then prompts: seconds, and the resident memory afterwards, which does not grow with them.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from export import OnnxOptions, export_onnx
from runtime import load
from wm_models.presets import create

NEW = 24
ROUNDS = 5


def engine_steps(artifact: Path, positions: list[int], threads: int) -> list[float]:
    """Seconds a token at each position: the best of some rounds."""
    engine = load(artifact, threads=threads)
    times = []
    for position in positions:
        engine.reset()
        engine.reserve(1, engine.graph.max_length)
        ids = engine.append(_prompt(engine.graph.vocabulary, position), argmax=True)
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(NEW):
                ids = engine.append(ids[:, None], argmax=True)
            rounds.append((time.perf_counter() - started) / NEW)
        times.append(min(rounds))
    return times


def transformers_steps(checkpoint: Path, positions: list[int], threads: int) -> list[float]:
    """The same of transformers' `generate`, over a cache of random keys."""
    torch.set_num_threads(threads)
    config = transformers.DogeConfig.from_pretrained(checkpoint)
    model: Any = transformers.DogeForCausalLM(config).eval()
    size = config.hidden_size // config.num_attention_heads
    times = []
    for position in positions:
        ids, rounds = torch.from_numpy(_prompt(config.vocab_size, position + 1)), []
        for _ in range(ROUNDS):
            cache = transformers.DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                cache.update(*torch.randn(2, 1, config.num_key_value_heads, position, size).unbind(0), layer)
            started = time.perf_counter()
            model.generate(ids, cache=cache, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
            rounds.append((time.perf_counter() - started) / NEW)
        times.append(min(rounds))
    return times


def prompts(artifact: Path, lengths: list[int], threads: int) -> list[tuple[float, int]]:
    """Seconds of a prefill of each length, and the bytes that are resident afterwards."""
    engine = load(artifact, threads=threads)
    found = []
    for length in lengths:
        engine.reset()
        engine.reserve(1, engine.graph.max_length)
        started = time.perf_counter()
        engine.prefill(_prompt(engine.graph.vocabulary, length))
        status = Path("/proc/self/status").read_text()
        resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
        found.append((time.perf_counter() - started, resident))
    return found


def _prompt(vocabulary: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocabulary, (1, length))


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="doge-60m")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    length, threads = options.length, options.threads
    with tempfile.TemporaryDirectory() as root:
        checkpoint, artifact = Path(root, "checkpoint"), Path(root, "artifact")
        model = create(options.preset)
        model.config.max_position_embeddings = length
        keep = model.config.keep_window_size
        model.save_pretrained(checkpoint)
        export_onnx(checkpoint, artifact, OnnxOptions(max_batch=1))
        del model
        positions = [2000, length // 4, length // 2 - 192, length - 384]
        mine = _apart(engine_steps, artifact, positions, threads)
        theirs = _apart(transformers_steps, checkpoint, positions, threads)
        lengths = [length // 8, length // 4, length // 2]
        filled = _apart(prompts, artifact, lengths, threads)
    title = f"{options.preset}, float32, batch 1, keep window {keep}, length {length}: ms a token"
    table = Table("position", "engine", "transformers", "times as fast", title=title, title_justify="left")
    for position, own, other in zip(positions, mine, theirs, strict=True):
        table.add_row(str(position), f"{own * 1e3:.1f}", f"{other * 1e3:.1f}", f"{other / own:.1f}")
    memory = Table("prompt", "seconds", "MB resident afterwards")
    for tokens, (seconds, resident) in zip(lengths, filled, strict=True):
        memory.add_row(str(tokens), f"{seconds:.1f}", f"{resident / 1e6:.0f}")
    Console(width=120).print(table, memory)


if __name__ == "__main__":
    main()
