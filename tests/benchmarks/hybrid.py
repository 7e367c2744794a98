"""What a hybrid costs beside attention alone, in exported artifacts: seconds of a decode step, and memory.

python tests/benchmarks/hybrid.py layers|models [--size 160m] [--root DIR] [--export-only]

`layers`: one layer's step and state at several positions; LAYERS layers of the size's width over a vocabulary of 256,
so that the step is that of its layers. `models`: the presets of both models with room for 16384 tokens, at several
contexts. Artifacts that --root has already are not exported again. Float32, batch 1, prefill in chunks. A step at
position P is the median of the steps before P, in CPU time of one thread, which other work on the machine disturbs
least; the artifacts take turns in one process, and each peak is that of a fresh one.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import manual_seed

from export import OnnxOptions, export_onnx
from export.verification.comparison import worst
from runtime import Engine, load
from runtime.bench import PYTHON
from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM, preset

POSITIONS, CONTEXTS, LENGTH = (128, 512, 2048, 8192, 16384), (512, 2048, 8192), 16384
LAYERS, CHUNK, STEPS, ROUNDS, THREADS = 8, 512, 8, 6, 1
CHANGES = {"max_position_embeddings": LENGTH}


def export(root: Path, name: str, config: DogeConfig) -> Path:
    """An artifact of random weights, unless there is one."""
    if not (root / name).exists():
        manual_seed(0)
        model = (CheemsForCausalLM if isinstance(config, CheemsConfig) else DogeForCausalLM)(config)
        model.save_pretrained(root / f"{name}.checkpoint")
        verdicts = export_onnx(root / f"{name}.checkpoint", root / name, OnnxOptions(max_batch=1))
        print(name, "" if all(verdict.passed for verdict in verdicts) else worst(verdicts), file=sys.stderr)
    return root / name


def advance(engine: Engine, position: int) -> None:
    """Prefill the one slot on to `position`; its caches grow on the way."""
    held = int(engine.lengths.sum())
    ids = np.random.default_rng(0).integers(3, engine.graph.vocabulary, (1, position - held))
    for start in range(0, ids.shape[1], CHUNK):
        engine.prefill(ids[:, start : start + CHUNK])


def step_seconds(engines: list[Engine], position: int) -> list[float]:
    """Each engine's median over the decode steps that lead up to `position`; the engines take turns."""
    times: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        advance(engine, position - ROUNDS * STEPS)
    for _ in range(ROUNDS):
        for engine, found in zip(engines, times, strict=True):
            for step in range(STEPS):
                started = time.thread_time()
                engine.append([[3]], argmax=True)
                if step:  # the first one finds the other engine's weights in the processor's caches
                    found.append(time.thread_time() - started)
    return [median(found) for found in times]


def state_bytes(engine: Engine) -> int:
    return sum(cache.nbytes for cache in engine.session.caches)


def peak_bytes(artifact: Path, position: int) -> int:
    """The largest resident size of a process of the runtime alone, which fills a slot up to `position` and decodes."""
    code = (
        "import sys\nfrom runtime import load\n"
        f"engine = load(sys.argv[1], threads={THREADS}, allow_unverified=True)\n"
        f"for start in range(0, {position} - 1, {CHUNK}):\n"
        f"    engine.prefill([[3] * min({CHUNK}, {position} - 1 - start)])\n"
        "engine.decode([3])\nprint(open('/proc/self/status').read())"
    )
    done = subprocess.run([*PYTHON, "-c", code, str(artifact)], check=True, stdout=subprocess.PIPE, text=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)  # not ru_maxrss, which begins at the parent's size
    assert found
    return int(found[1]) * 1024


def layer_artifacts(root: Path, size: str) -> dict[str, Path]:
    fields = {**preset(f"doge-{size}").to_dict(), **CHANGES, "vocab_size": 256, "num_hidden_layers": LAYERS}
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "num_bias_heads")}
    hybrid = {**fields, "query_key_norm": False, "keep_window_size": CheemsConfig().keep_window_size}
    kinds = {
        "SSD": CheemsConfig(**hybrid, attn_layer_period=LAYERS + 1, attn_layer_offset=LAYERS),
        "attention": DogeConfig(**{**fields, "keep_window_size": LENGTH}),
    }
    return {kind: export(root, f"{kind}-{size}", config) for kind, config in kinds.items()}


def model_artifacts(root: Path, size: str) -> dict[str, Path]:
    configs = {name: preset(name) for name in (f"cheems-{size}", f"doge-{size}")}
    return {
        name: export(root, name, type(config)(**{**config.to_dict(), **CHANGES})) for name, config in configs.items()
    }


def layers(artifacts: dict[str, Path]) -> Table:
    engines = [load(artifact, threads=THREADS, allow_unverified=True) for artifact in artifacts.values()]
    columns = ("position", *(f"{kind}: {unit}" for kind in artifacts for unit in ("µs", "state")))
    table = Table(*columns, title="a layer with its MLP", title_justify="left")
    for position in POSITIONS:
        cells = []
        for engine, seconds in zip(engines, step_seconds(engines, position), strict=True):
            cells += [f"{seconds / LAYERS * 1e6:.0f}", f"{state_bytes(engine) / LAYERS / 2**20:.2f} MiB"]
        table.add_row(str(position), *cells)
    return table


def models(artifacts: dict[str, Path]) -> Table:
    columns = (
        "context",
        *(f"{name}: {unit}" for name in artifacts for unit in ("tokens/s", "states", "peak")),
        "times",
    )
    table = Table(*columns, title=" beside ".join(artifacts), title_justify="left")
    for context in CONTEXTS:
        peaks = [peak_bytes(artifact, context) for artifact in artifacts.values()]
        engines = [load(artifact, threads=THREADS, allow_unverified=True) for artifact in artifacts.values()]
        seconds, cells = step_seconds(engines, context), []
        for engine, one, peak in zip(engines, seconds, peaks, strict=True):
            cells += [f"{1 / one:.1f}", f"{state_bytes(engine) / 2**20:.1f} MiB", f"{peak / 1e6:.0f} MB"]
        table.add_row(str(context), *cells, f"{seconds[1] / seconds[0]:.2f}")
        del engines
    return table


def main() -> None:
    kinds = {"layers": (layer_artifacts, layers), "models": (model_artifacts, models)}
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--size", default="160m")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--export-only", action="store_true")
    options = parser.parse_args()
    make, tabulate = kinds[options.kind]
    with tempfile.TemporaryDirectory() as temporary:
        artifacts = make(options.root or Path(temporary), options.size)
        if not options.export_only:
            Console(width=160).print(tabulate(artifacts))


if __name__ == "__main__":
    main()
