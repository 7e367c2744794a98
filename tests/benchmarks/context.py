"""A long context, kept to a window: decode beside positions and beside transformers, and prefill in chunks.

python tests/benchmarks/context.py [--preset doge-60m] [--length 16384] [--threads 2]

One table: milliseconds a decode step at each position in an artifact of that length whose keep window is the preset's,
and of transformers' own Doge over a cache of that many keys, both with random weights, in float32. Then a prompt of
half the length: seconds, and resident memory, which the chunks keep from growing with the prompt.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from export import export_onnx
from runtime import Engine, load
from wm_models.presets import create

STEPS = 24


def engine_step(engine: Engine, position: int) -> float:
    """Median seconds of a decode step at `position`; the slot is filled by prefill."""
    ids = np.random.default_rng(0).integers(0, engine.graph.vocabulary, (1, position))
    engine.reset()
    engine.reserve(1, engine.graph.max_length)
    engine.prefill(ids)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.decode([1])
        times.append(time.perf_counter() - started)
    return median(times)


def transformers_step(model: torch.nn.Module, position: int) -> float:
    """Median seconds of a forward of one token over a cache of `position` random keys."""
    config = model.config
    cache = transformers.DynamicCache(config=config)
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        key, value = torch.randn(2, 1, config.num_key_value_heads, position, size).unbind(0)
        cache.update(key, value, layer)
    times = []
    with torch.inference_mode():
        for _ in range(STEPS):
            started = time.perf_counter()
            model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - started)
    return median(times)


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="doge-60m")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        model = create(options.preset)
        model.config.max_position_embeddings = options.length
        keep = model.config.keep_window_size
        model.save_pretrained(Path(root, "checkpoint"))
        config = transformers.DogeConfig.from_pretrained(Path(root, "checkpoint"))
        rival = transformers.DogeForCausalLM(config).eval()
        export_onnx(Path(root, "checkpoint"), Path(root, "artifact"), max_batch=1)
        del model
        engine = load(Path(root, "artifact"), threads=options.threads)
        title = f"{options.preset}, float32, batch 1, keep window {keep}, length {options.length}"
        table = Table("position", "ms a step", "transformers", "times as fast", title=title, title_justify="left")
        for position in (2000, options.length // 4, options.length // 2 - 192, options.length - 384):
            mine, theirs = engine_step(engine, position), transformers_step(rival, position)
            table.add_row(str(position), f"{mine * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{theirs / mine:.1f}")
        del rival
        table_2 = Table("prompt", "seconds", "MB resident after it")
        for length in (options.length // 8, options.length // 4, options.length // 2):
            ids = np.random.default_rng(0).integers(0, engine.graph.vocabulary, (1, length))
            engine.reset()
            started = time.perf_counter()
            engine.prefill(ids)
            table_2.add_row(str(length), f"{time.perf_counter() - started:.1f}", f"{resident() / 1e6:.0f}")
        console = Console(width=120)
        console.print(table)
        console.print(table_2)


if __name__ == "__main__":
    main()
