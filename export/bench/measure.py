"""Measure an artifact beside the floor of its linear layers and beside baselines, in one run."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from export.bench.baselines import ADVANCED, BASELINES
from export.bench.cost import linear_layers, linear_operations, own_precision, step_bytes
from export.bench.floor import large_product, linear_floor
from runtime.bench import CONTEXT_STEPS, PYTHON, Bench, BenchOptions, Result, Samples, fresh_process, over_one
from runtime.console import Progress, option
from runtime.errors import RequestError


@dataclass(frozen=True)
class BaselineOptions:
    """What to measure an artifact beside."""

    against: list[str] = option([], f"A baseline: {', '.join(BASELINES)}; may be repeated.")


def measure(directory: Path, options: BenchOptions, baselines: BaselineOptions) -> Result:
    """What `runtime.bench.measure` finds; on a CPU the floor and the artifact's share of it; and each baseline.

    The floor alternates with the engine. A baseline runs afterwards, in a process of its own; where it cannot run, the
    result says why. Raises `RequestError` for an unknown baseline and for what the artifact cannot hold.
    """
    for name in baselines.against:
        if name not in BASELINES:
            raise RequestError(f"--against is {name!r}; expected one of {', '.join(BASELINES)}")
    with Progress("bench") as progress:
        bench = Bench(directory, options, progress)
        request = _request(bench)
        progress.expect(len(baselines.against) * (options.rounds + len(bench.contexts)))
        samples = bench.sample(_floors(bench) if bench.on_cpu else {})
        result, on_cpu = bench.summary(samples), bench.on_cpu
        if on_cpu:
            result |= _shares(bench, samples)
        if options.plot is not None:
            result["contexts"] = bench.by_context()
        if on_cpu and options.plot is not None:
            result |= _limits(bench, result["floor_steps_per_second"])
        bench.engine.close()  # its memory is not there twice
        del bench
        if on_cpu:
            result |= fresh_process(result, options)
        found = {name: _baseline(name, directory, request, progress) for name in baselines.against}
        return result | {"baselines": {name: _beside(result, baseline) for name, baseline in found.items()}}


def _floors(bench: Bench) -> dict[str, Callable[[], float]]:
    """What to time beside the engine: its linear layers alone in decode, in prefill and in all slots, and a product."""
    artifact, options = bench.engine.artifact, bench.options
    probes = {
        "floor": linear_floor(artifact, options.threads),
        "prefill_floor": linear_floor(artifact, options.threads, tokens=options.prompt_length, steps=1),
        "product": large_product(options.threads),
    }
    if options.batch > 1:
        probes["batch_floor"] = linear_floor(artifact, options.threads, batch=options.batch)
    return probes


def _shares(bench: Bench, samples: Samples) -> Result:
    """The floor's rate, and the engine as a share of it: the medians of each round's ratio."""
    work = linear_operations(bench.engine.artifact, bench.options.prompt_length)

    def share(part: str, whole: str) -> float:
        return median(a / b for a, b in zip(samples[part], samples[whole], strict=True))

    pairs = zip(samples["prefill"], samples["product"], strict=True)
    result: Result = {
        "floor_steps_per_second": 1 / median(samples["floor"]),
        "share_of_floor": share("floor", "decode"),
        "prefill_share_of_floor": share("prefill_floor", "prefill"),
        "product_flops": median(samples["product"]),
        "prefill_share_of_product": median(work / seconds / rate for seconds, rate in pairs),
    }
    if "batch_floor" in samples:
        result["batch_floor_over_one"] = over_one(bench.options.batch, samples["floor"], samples["batch_floor"])
    return result


def _limits(bench: Bench, floor: float) -> Result:
    """The bytes/s that the linear layers alone read at `floor` steps/s, and the steps/s that this allows by context."""
    artifact = bench.engine.artifact
    bandwidth = floor * sum(map(own_precision(artifact).matrix_bytes, linear_layers(artifact)))
    limits = {context: bandwidth / step_bytes(artifact, context) for context in bench.contexts}
    return {"bandwidth": bandwidth, "bandwidth_limits": limits}


def _request(bench: Bench) -> dict[str, Any]:
    """What a baseline's process is asked for."""
    options, graph = bench.options, bench.engine.graph
    longest = max(options.prompt_length + options.new_tokens, *bench.contexts, 0)
    return {
        "prompt_length": options.prompt_length,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "threads": options.threads or 0,
        "capacity": next(size for size in graph.capacities if size >= longest),
        "contexts": bench.contexts,
        "context_steps": CONTEXT_STEPS,
    }


def _baseline(name: str, directory: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """A baseline's seconds, or why it has none. It needs packages that this process does without."""
    command = [*PYTHON, "-m", "export.bench.baselines", name, str(directory), json.dumps(request)]
    last = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == ADVANCED:
                progress.advance()
            last = line
        if process.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            return {"failed": lines[-1]}
    return json.loads(last)


def _beside(result: Result, baseline: dict[str, Any]) -> Result:
    """A baseline's rates, and how many times as fast this engine and its floor are."""
    if "failed" in baseline:
        return baseline
    rate = result["new_tokens"] / baseline["generate_seconds"]
    ratios = {"times_as_fast": result["generate_tokens_per_second"] / rate}
    if "floor_steps_per_second" in result:
        ratios["floor_times_as_fast"] = result["floor_steps_per_second"] / rate
    return {
        "generate_tokens_per_second": rate,
        "prefill_tokens_per_second": result["prompt_length"] / baseline["prefill_seconds"],
        "decode_tokens_per_second": 1 / baseline["step_seconds"],
        **ratios,
        "contexts": {int(context): 1 / seconds for context, seconds in baseline["context_seconds"].items()},
    }
