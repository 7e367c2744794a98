"""The cost model of `wm-export roofline` on this CPU: predicted and measured seconds of a decode step.

python tests/benchmarks/roofline.py [--root DIR] [PRESET …]        (default: doge-20m doge-160m)

A step is predicted from the bytes and operations that are counted in the graph, and from four rates of this machine:
bytes/s of one product of one row with a matrix of the step's size, in the artifact's own kind of weights; bytes/s of
one attention of the model's heads over 1024 keys; operations/s of a large float32 product; and seconds of an operator,
by a step of a model so small that its operators have next to nothing to do. Attention in ONNX Runtime reads a cache to
the end of its buffer, so the context is the capacity. Rates and steps alternate, round by round, in CPU time of one
thread, which other work on the machine disturbs least. Artifacts have random weights, which do not change how long a
step takes, and are not compared with the eager model. Batch 1.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from export import OnnxOptions
from export.bench.cost import graph_parts, own_precision, step_costs, step_operators, step_seconds
from export.bench.floor import attention_bandwidth, large_product, memory_bandwidth
from export.package.manifest import write_manifest
from export.targets.base import Draft
from export.targets.onnx_artifact import ONNX
from runtime import Engine, load
from runtime.artifact.manifest import Artifact

CONTEXTS, LENGTH = (256, 1024, 2048), 2048
ROUNDS, STEPS, CHUNK, KEYS = 5, 12, 512, 1024
SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"


def export(root: Path, preset: str, scheme: str) -> Path:
    """The artifact, unless there is one."""
    directory = root / f"{preset}-{scheme}"
    if not directory.exists():
        directory.mkdir(parents=True)
        draft = Draft(directory, preset)
        ONNX.write(draft, OnnxOptions(quantize=None if scheme == "fp32" else scheme, max_batch=1, max_length=LENGTH))
        write_manifest(directory, draft.manifest, verified=True)
    return directory


def fill(engine: Engine, context: int) -> None:
    """Have the one slot hold so many tokens that the rounds' steps end at `context`, in a buffer of as many."""
    ids = np.random.default_rng(0).integers(0, engine.graph.vocabulary, (1, max(1, context - ROUNDS * STEPS)))
    engine.reset()
    engine.reserve(1, context)
    for start in range(0, ids.shape[1], CHUNK):
        engine.append(ids[:, start : start + CHUNK], argmax=True)


def step(engine: Engine) -> float:
    """The median of some decode steps."""
    times = []
    for _ in range(STEPS):
        started = time.thread_time()
        engine.append([[3]], argmax=True)
        times.append(time.thread_time() - started)
    return median(times)


def rates(artifact: Artifact, small: Engine) -> Callable[[], tuple[float, float, float, float]]:
    """A function that measures this machine: bytes/s of weights and of caches, operations/s, seconds an operator."""
    parts, own = graph_parts(artifact), own_precision(artifact)
    size = sum(cost.weights for cost in step_costs(artifact, parts, own, 1, 1))
    quantised = [each for part in parts for each in part.matrices if each.bits]
    kind = {"bits": quantised[0].bits, "block": quantised[0].block} if quantised else {}
    attention = next(part for part in parts if part.attention)
    key = attention.states[0]
    heads = attention.attention // (4 * key.sized(1, 1)[-1])
    weights = memory_bandwidth(int(size), 1, **kind, clock=time.thread_time)
    caches = attention_bandwidth(key, heads, KEYS, 1, clock=time.thread_time)
    product, operators = large_product(1, clock=time.thread_time), step_operators(small.artifact)

    def run() -> tuple[float, float, float, float]:
        fill(small, 64)
        return weights(), caches(), product(), step(small) / operators

    return run


def measure(directory: Path, small: Engine) -> list[list[str]]:
    """A row for each context."""
    with load(directory, backend="cpu", threads=1) as engine:
        artifact, operators = engine.artifact, step_operators(engine.artifact)
        measured, rows = rates(artifact, small), []
        for context in CONTEXTS:
            costs = step_costs(artifact, graph_parts(artifact), own_precision(artifact), 1, context)
            fill(engine, context)
            rounds = []
            for _ in range(ROUNDS):
                reads, caches, works, launch = measured()
                moved, started = step_seconds(costs, reads, works, caches), launch * operators
                found = step(engine)
                rounds.append((reads, caches, moved, started, moved + started, found, found / (moved + started)))
            middle = [median(values) for values in zip(*rounds, strict=True)]
            shown = [f"{value / 1e9:.1f}" for value in middle[:2]] + [f"{1e3 * value:.2f}" for value in middle[2:6]]
            rows.append([directory.name, str(context), *shown, f"{middle[6]:.2f}"])
        return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    parser.add_argument("--schemes", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("presets", nargs="*", default=["doge-20m", "doge-160m"])
    given = parser.parse_args()
    columns = (
        "artifact", "context", "weights, GB/s", "caches, GB/s", "bytes", "operators", "predicted", "measured", "ratio",
    )  # fmt: skip
    table = Table(*columns, title="a decode step in ms, batch 1, one thread, CPU time", title_justify="left")
    with tempfile.TemporaryDirectory() as own, load(SMALL, backend="cpu", threads=1) as small:
        for preset in given.presets:
            for scheme in given.schemes:
                for row in measure(export(given.root or Path(own), preset, scheme), small):
                    table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
