"""The cost model of `wm-export roofline` on this CPU: predicted and measured seconds of a decode step.

python tests/benchmarks/roofline.py [--root DIR] [PRESET …]        (default: doge-20m doge-160m)

A step is predicted from the bytes and operations that are counted in the graph, and from three rates of this machine:
bytes/s of one product of one row with a matrix of the step's size, in the artifact's own kind of weights; operations/s
of a large float32 product; and seconds of an operator that does next to nothing, times the operators of the graph.
Attention in ONNX Runtime reads a cache to the end of its buffer, so the context is the capacity. Rates and steps
alternate, round by round. Artifacts have random weights, which do not change how long a step takes, and are not
compared with the eager model. Batch 1, all physical cores.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from export import OnnxOptions
from export.bench.cost import graph_parts, own_precision, step_costs, step_operators, step_seconds
from export.bench.floor import large_product, memory_bandwidth, operator_seconds
from export.package.manifest import write_manifest
from export.targets.base import Draft
from export.targets.onnx_artifact import ONNX
from runtime import Engine, load

SCHEMES, CONTEXTS, LENGTH = (None, "int8", "int4"), (256, 1024, 2048), 2048
ROUNDS, STEPS, CHUNK = 5, 12, 512


def export(root: Path, preset: str, quantize: str | None) -> Path:
    """The artifact, unless there is one."""
    directory = root / f"{preset}-{quantize or 'fp32'}"
    if not directory.exists():
        directory.mkdir()
        draft = Draft(directory, preset)
        ONNX.write(draft, OnnxOptions(quantize=quantize, max_batch=1, max_length=LENGTH))
        write_manifest(directory, draft.manifest, verified=True)
    return directory


def step(engine: Engine, context: int) -> float:
    """The median of the decode steps that lead up to `context` tokens, in a buffer of as many."""
    ids = np.random.default_rng(0).integers(0, engine.graph.vocabulary, (1, context - STEPS))
    engine.reset()
    engine.reserve(1, context)
    for start in range(0, ids.shape[1], CHUNK):
        engine.append(ids[:, start : start + CHUNK], argmax=True)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        engine.append([[3]], argmax=True)
        times.append(time.perf_counter() - started)
    return median(times)


def measure(directory: Path) -> list[list[str]]:
    """A row for each context."""
    with load(directory, backend="cpu") as engine:
        artifact, operators = engine.artifact, step_operators(engine.artifact)
        precision, parts = own_precision(artifact), graph_parts(artifact)
        size = sum(cost.weights for cost in step_costs(artifact, parts, precision, 1, 1))
        quantised = [each for part in parts for each in part.matrices if each.bits]
        kind = {"bits": quantised[0].bits, "block": quantised[0].block} if quantised else {}
        bandwidth, rate, launch = memory_bandwidth(int(size), None, **kind), large_product(None), operator_seconds(None)
        rows = []
        for context in CONTEXTS:
            costs = step_costs(artifact, parts, precision, 1, context)
            rounds = []
            for _ in range(ROUNDS):
                reads, works, starts = bandwidth(), rate(), launch()
                rounds.append((step_seconds(costs, reads, works), starts * operators, step(engine, context), reads))
            moved, started, found, reads = (median(values) for values in zip(*rounds, strict=True))
            ratio = median(found / (moved + started) for moved, started, found, _ in rounds)
            figures = [1e3 * moved, 1e3 * started, 1e3 * (moved + started), 1e3 * found]
            rows.append(
                [
                    directory.name,
                    str(context),
                    f"{reads / 1e9:.1f}",
                    *(f"{value:.2f}" for value in figures),
                    f"{ratio:.2f}",
                ]
            )
        return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    parser.add_argument("presets", nargs="*", default=["doge-20m", "doge-160m"])
    given = parser.parse_args()
    columns = ("artifact", "context", "GB/s", "bytes, ms", "operators, ms", "predicted, ms", "measured, ms", "ratio")
    table = Table(*columns, title="a decode step, batch 1", title_justify="left")
    with tempfile.TemporaryDirectory() as own:
        for preset in given.presets:
            for quantize in SCHEMES:
                for row in measure(export(given.root or Path(own), preset, quantize)):
                    table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
