"""Measure an artifact alone: start-up, prefill, decode and memory of its engine, and a picture of decode speed.

Nothing is imported that loading and generating do not need; only a picture takes matplotlib.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.console import Progress, option
from runtime.engine import load
from runtime.errors import RequestError
from runtime.loading import DeviceOptions

CONTEXT_STEPS = 16  # decode steps that lead up to each context length
PAUSE = 0.1  # seconds between two measurements: a session's threads go on spinning for a while after its last run
CHUNK = 512  # tokens of a step on the way to a context
FIRST_PROMPT = 16  # tokens of the prompt whose first token is timed
PICTURES = (".png", ".svg", ".pdf")
# A child process imports what is installed, and nothing that lies in the directory a person happens to be in.
PYTHON = (sys.executable, "-P")
Result = dict[str, Any]
Samples = dict[str, list[float]]  # seconds (or operations a second) of each round, by what was measured
Rates = Mapping[int, float]  # decode tokens/s by context length


@dataclass(frozen=True)
class BenchOptions(DeviceOptions):
    """What to measure of an artifact, and by what."""

    prompt_length: int = option(128, "Tokens of the prompt.")
    new_tokens: int = option(128, "Tokens to generate.")
    rounds: int = option(5, "Measurements; the median counts.")
    batch: int = option(1, "Decode in this many slots too.")
    as_json: bool = option(False, "Print JSON instead of a table.", flag="--json")
    plot: Path | None = option(None, "Draw decode tokens/s over context length into this file, .png for one.")


class Bench:
    """An artifact that is being measured: its engine, the prompt, and how far the work has come."""

    def __init__(self, directory: Path, options: BenchOptions, progress: Progress) -> None:
        """Load the artifact. Raises `RequestError` where it is a classifier or cannot hold what `options` ask for."""
        if options.plot is not None:
            check_plot(options.plot)
        started = time.perf_counter()
        self.engine = load(directory, options.backend, device=options.device, threads=options.threads)
        self.load_seconds = time.perf_counter() - started
        self.directory, self.options, self.progress = directory, options, progress
        if self.engine.labels:
            raise RequestError(f"{directory}: is a classifier, which writes no text; bench measures a language model")
        graph, prompt_length, new_tokens = self.engine.graph, options.prompt_length, options.new_tokens
        if min(prompt_length, new_tokens - 1, options.rounds) < 1 or prompt_length + new_tokens > graph.max_length:
            raise RequestError(
                f"a prompt of {prompt_length} and {new_tokens} new tokens, {options.rounds} rounds; expected at least "
                f"1, 2 and 1, and together no more tokens than the capacity, {graph.max_length}"
            )
        if not 1 <= options.batch <= graph.max_batch:
            raise RequestError(f"--batch is {options.batch}; expected 1 to {graph.max_batch}, the artifact's slots")
        self.prompt = np.random.default_rng(0).integers(0, graph.vocabulary, prompt_length)
        self.on_cpu = self.engine.session.device_name == "CPU"
        self.contexts = context_lengths(graph.max_length) if options.plot is not None else []
        progress.expect(options.rounds + len(self.contexts))

    def sample(self, probes: Mapping[str, Callable[[], float]]) -> Samples:
        """Seconds of each round: `prefill`, a `decode` step, one in all slots as `batch`, and what each probe returns.

        The probes take turns with the engine, round by round, so a machine that slows down slows all of them.
        """
        options = self.options
        self._generate()  # warms up, as the probes do themselves
        samples: Samples = {name: [] for name in ("prefill", "decode", "batch", *probes)}
        for _ in range(options.rounds):
            prefill, decode = _rested(self._generate)
            samples["prefill"].append(prefill)
            samples["decode"].append(decode)
            if options.batch > 1:
                samples["batch"].append(_rested(partial(self._generate, options.batch))[1])
            for name, probe in probes.items():
                samples[name].append(_rested(probe))
            self.progress.advance()
        return samples

    def summary(self, samples: Samples) -> Result:
        """What was measured, and the medians: tokens/s, seconds, bytes, and the ratios between them."""
        options, graph = self.options, self.engine.graph
        pairs = zip(samples["prefill"], samples["decode"], strict=True)
        wholes = [prefill + step * (options.new_tokens - 1) for prefill, step in pairs]
        files = self.engine.artifact.files.items()
        result: Result = {
            "artifact": str(self.directory),
            "device": self.engine.session.device_name,
            "dtype": graph.dtype,
            "quantization": graph.quantization,
            "prompt_length": options.prompt_length,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "threads": options.threads,
            "load_seconds": self.load_seconds,
            "prefill_tokens_per_second": options.prompt_length / median(samples["prefill"]),
            "decode_tokens_per_second": 1 / median(samples["decode"]),
            "generate_tokens_per_second": options.new_tokens / median(wholes),
            "weights_bytes": sum(file.size for name, file in files if name.endswith(".data")),
        }
        if options.batch > 1:
            result["batch"] = options.batch
            result["batch_tokens_per_second"] = options.batch / median(samples["batch"])
            result["batch_over_one"] = over_one(options.batch, samples["decode"], samples["batch"])
        return result

    def by_context(self) -> Rates:
        """Decode tokens/s at each of the context lengths."""
        found = {}
        for context in self.contexts:
            found[context] = 1 / self._context_seconds(context)
            self.progress.advance()
        return found

    def _generate(self, batch: int = 1) -> tuple[float, float]:
        """Seconds to the first token, and seconds of each step after it; greedy, with no end-of-sequence."""
        engine, new_tokens = self.engine, self.options.new_tokens
        engine.reset()
        started = time.perf_counter()
        engine.reserve(batch, len(self.prompt) + new_tokens)
        ids = engine.append(np.tile(self.prompt, (batch, 1)), argmax=True)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            ids = engine.append(ids[:, None], argmax=True)
        return first - started, (time.perf_counter() - first) / (new_tokens - 1)

    def _context_seconds(self, context: int) -> float:
        """The median of the decode steps that lead up to `context` tokens."""
        engine, steps = self.engine, min(CONTEXT_STEPS, context - 1)
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


def measure(directory: Path, options: BenchOptions) -> Result:
    """Medians over the rounds, of batch 1, and of decoding in `batch` slots; with `plot`, decode by context length too.

    On a CPU a new process gives start-up and peak memory. Raises `RequestError` for what the artifact cannot hold.
    """
    with Progress("bench") as progress:
        bench = Bench(directory, options, progress)
        result, on_cpu = bench.summary(bench.sample({})), bench.on_cpu
        if options.plot is not None:
            result["contexts"] = bench.by_context()
        bench.engine.close()  # its memory is not there twice
        del bench
        return result | (fresh_process(result, options) if on_cpu else {})


def fresh_process(result: Result, options: BenchOptions) -> Result:
    """A new process's seconds to load and to load and give the first token, and its largest resident size."""
    code = (
        "import sys, time\nfrom runtime import load\nstarted = time.perf_counter()\n"
        f"engine = load(sys.argv[1], 'cpu', threads={options.threads!r})\nloaded = time.perf_counter() - started\n"
        f"engine.prefill([[0] * {min(FIRST_PROMPT, options.prompt_length)}])\nfirst = time.perf_counter() - started\n"
        f"engine.reset()\nengine.prefill([[0] * {options.prompt_length}])\nengine.decode([0])\n"
        "print(loaded, first, open('/proc/self/status').read())"
    )
    command = [*PYTHON, "-c", code, result["artifact"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, first, status = done.stdout.split(maxsplit=2)
    peak = re.search(r"VmHWM:\s+(\d+)", status)  # not ru_maxrss, which begins at its parent's size
    assert peak
    size = int(peak[1]) * 1024
    return {
        "load_seconds": float(loaded),
        "first_token_seconds": float(first),
        "peak_bytes": size,
        "peak_over_weights": size / result["weights_bytes"],
    }


def over_one(batch: int, one: Sequence[float], all_: Sequence[float]) -> float:
    """Times as many tokens/s in `batch` slots as in one: the median over the rounds, from seconds of a step."""
    return median(batch * single / many for single, many in zip(one, all_, strict=True))


def context_lengths(max_length: int) -> list[int]:
    """128, doubled up to the capacity, which is the last."""
    sizes = [128 << power for power in range(max_length.bit_length()) if 128 << power < max_length]
    return [*sizes, max_length]


def table_rows(result: Result) -> list[tuple[str, str]]:
    """Each measure by name, with its value and unit."""
    rows = [
        ("load", f"{result['load_seconds']:.2f} s"),
        ("prefill", f"{result['prefill_tokens_per_second']:.0f} tokens/s"),
        ("decode", f"{result['decode_tokens_per_second']:.1f} tokens/s"),
        ("generate, prefill and decode", f"{result['generate_tokens_per_second']:.1f} tokens/s"),
        ("weights", f"{result['weights_bytes'] / 1e6:.0f} MB"),
    ]
    if "batch" in result:
        rows.append((f"decode, batch {result['batch']}", f"{result['batch_tokens_per_second']:.1f} tokens/s"))
        rows.append(("times batch 1", f"{result['batch_over_one']:.2f}"))
    if "peak_bytes" in result:
        prompt = min(FIRST_PROMPT, result["prompt_length"])
        rows.append((f"load and first token after a prompt of {prompt}", f"{result['first_token_seconds']:.2f} s"))
        rows.append(("peak memory of a process", f"{result['peak_bytes'] / 1e6:.0f} MB"))
        rows.append(("peak memory / weights", f"{result['peak_over_weights']:.2f}"))
    return rows


def render(result: Result, rows: Sequence[tuple[str, str]], as_json: bool) -> None:
    """Print a result as a table of `rows`, or as JSON."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = (
        f"{result['artifact']}: {result['dtype']}, quantization {result['quantization']}, batch 1, prompt "
        f"{result['prompt_length']}, {result['new_tokens']} new tokens, median of {result['rounds']}"
    )
    table = Table("measure", "value", title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def check_plot(path: Path) -> None:
    """Raise `RequestError` where no picture could be drawn at `path`, before anything is measured."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install it with pip install 'wm-models[export]'")
    if path.suffix not in PICTURES or not path.parent.is_dir():
        raise RequestError(f"--plot is {path}; expected a .png, .svg or .pdf file in a directory that exists")


def plot(result: Result, path: Path, beside: Mapping[str, Rates] | None = None, limit: Rates | None = None) -> None:
    """Draw decode tokens/s over context length: the artifact's, others `beside` it by name, and a `limit`.

    `limit` is what reading memory at result["bandwidth"] bytes/s allows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for name, rates in {Path(result["artifact"]).name: result["contexts"], **(beside or {})}.items():
        axes.plot(list(rates), list(rates.values()), marker="o", label=name)
    if limit is not None:
        label = f"reading memory as linear layers alone do, {result['bandwidth'] / 1e9:.0f} GB/s"
        axes.plot(list(limit), list(limit.values()), "k--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="decode, tokens/s")
    axes.set_xticks(list(result["contexts"]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter("")
    low, high = axes.get_ylim()
    ticks = [digit * 10**power for power in range(-2, 6) for digit in (1, 1.5, 2, 3, 4, 5, 7)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    threads = f"{result['threads']} threads" if result["threads"] else "its physical cores"
    where = f"{result['device']}, {threads}" if result["device"] == "CPU" else result["device"]
    axes.set_title(f"{result['dtype']}, quantization {result['quantization']}, batch 1, {where}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _rested(run: Callable[[], Any]) -> Any:
    time.sleep(PAUSE)
    return run()
