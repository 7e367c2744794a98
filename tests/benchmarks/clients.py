"""A decode step in this engine's loop and in onnxruntime-genai's, from one directory; ratios from one run.

wm-export genai doge-3m --out DIR
python tests/benchmarks/clients.py DIR [--prompts 128 1800] [--steps 128] [--rounds 10] [--threads 1]

Each round generates greedily from the same ids, first with one and then with the other, and takes the median of its
steps. The table has the medians of the rounds and the fastest round of each.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime_genai as genai
from rich.console import Console
from rich.table import Table

from runtime import load

CONFIG = "genai_config.json"
Run = Callable[[list[int], int], list[float]]  # of a prompt and a number of tokens: the seconds of each step after it


def engine_run(directory: Path, threads: int) -> Run:
    """This engine, by the call that generates ids one by one."""
    engine = load(directory, threads=threads)
    engine.end_ids = frozenset()  # every generation has its full length

    def run(prompt: list[int], steps: int) -> list[float]:
        times = []
        for _ in engine.stream_ids(prompt, max_new_tokens=steps + 1):
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    return run


def genai_run(directory: Path, threads: int) -> Run:
    """onnxruntime-genai, by its own loop. `directory` is changed: its configuration names the threads."""
    path = directory / CONFIG
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))
    model = genai.Model(str(directory))

    def run(prompt: list[int], steps: int) -> list[float]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + steps + 1, min_length=len(prompt) + steps + 1)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        times = []
        for _ in range(steps + 1):
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1800])
    for name, default in (("steps", 128), ("rounds", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    table = Table("prompt", "engine, µs", "genai, µs", "engine / genai", "fastest", title_justify="left")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(given.directory, Path(folder) / "copy"))
        runs = engine_run(given.directory, given.threads), genai_run(copy, given.threads)
        vocabulary = json.loads((copy / "config.json").read_text())["vocab_size"]
        for length in given.prompts:
            prompt = np.random.default_rng(0).integers(0, vocabulary, length).tolist()
            rounds = [[median(run(prompt, given.steps)) for run in runs] for _ in range(given.rounds)]
            engine, other = (sorted(round[which] * 1e6 for round in rounds) for which in (0, 1))
            table.add_row(
                str(length), f"{median(engine):.0f}", f"{median(other):.0f}",
                f"{median(a / b for a, b in rounds):.2f}", f"{engine[0]:.0f} / {other[0]:.0f}",
            )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
