"""A server under clients of the OpenAI API: tokens/s and time to the first token; ratios from one run.

wm-export onnx doge-160m --quantize int8 --max-batch 9 --max-length 512 --out ARTIFACT
python tests/benchmarks/serving_http.py ARTIFACT [--new 128] [--rounds 2] [--threads 2] [--plot FILE.png]
    [--url http://127.0.0.1:8080]

`wm-run serve` and `wm-run generate` run in processes of their own, of 8 slots (and of one). A row is the best of its
rounds, in which the ways that a ratio compares take turns. CPU is what all threads of the server's process worked, not
the clients'. --url adds a server that is not ours, which has the same clients and is not measured for CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from runtime import load

CLIENTS = (1, 2, 4, 8, 16, 32)
LENGTH = 128  # tokens of a prompt
RUN = "from runtime.cli import main; main()"


@dataclass(frozen=True)
class Server:
    """Where a server answers, and the process that it is, if that is known."""

    client: openai.OpenAI
    model: str
    process: int | None = None

    def cpu(self) -> float:
        """Seconds that all threads of the process have worked."""
        if self.process is None:
            return float("nan")
        text = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Round:
    """What clients saw of a round: tokens, seconds, the server's CPU seconds, seconds to each first token."""

    tokens: int
    wall: float
    cpu: float
    first: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.wall


@contextmanager
def serving(artifact: str, slots: int, threads: int, *options: str) -> Iterator[Server]:
    command = ["serve", artifact, "--port", "0", "--slots", str(slots), "--threads", str(threads), "--cache", "0"]
    command += options
    process = subprocess.Popen([sys.executable, "-c", RUN, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"serving (.+) at (http://\S+)", process.stdout.readline())
        assert found is not None, "the server does not start"
        client = openai.OpenAI(base_url=f"{found[2]}/v1", api_key="none", max_retries=20, timeout=900)
        client.models.list()
        yield Server(client, found[1], process.pid)
    finally:
        process.terminate()
        process.wait(60)


def ask(server: Server, prompt: list[int] | str, new: int) -> tuple[int, float]:
    """Tokens of the answer, and seconds to the first of them. Token 1 ends a text, so it is made unlikely."""
    begun, first, tokens = time.perf_counter(), 0.0, 0
    stream = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=new, temperature=0, logit_bias={"1": -100}, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for piece in stream:
        first = first or time.perf_counter() - begun
        if piece.usage is not None:
            tokens = piece.usage.completion_tokens
    return tokens, first


def press(server: Server, prompts: list[list[int]] | list[str], new: int) -> Round:
    """Each prompt by a client of its own, all at once."""
    answers: list[tuple[int, float]] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: answers.append(ask(server, prompt, new))) for prompt in prompts
    ]
    wall, cpu = time.perf_counter(), server.cpu()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(prompts), "a client failed"
    wall, cpu = time.perf_counter() - wall, server.cpu() - cpu
    return Round(sum(tokens for tokens, _ in answers), wall, cpu, [first for _, first in answers])


def generate(artifact: str, prompts: list[list[int]], new: int, threads: int) -> tuple[float, float]:
    """Seconds of wall and of CPU that `wm-run generate --prompts` takes, loading left out."""

    def run(ids: list[list[int]], most: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as root:
            source = Path(root, "in.jsonl")
            source.write_text("\n".join(json.dumps({"ids": each}) for each in ids))
            command = ["generate", artifact, "--prompts", str(source), "--out", f"{root}/out.jsonl", "--slots", "8"]
            command += ["--max-new-tokens", str(most), "--threads", str(threads)]
            wall, before = time.perf_counter(), os.times()
            subprocess.run([sys.executable, "-c", RUN, *command], check=True, capture_output=True)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            return time.perf_counter() - wall, cpu

    (wall, cpu), (start, start_cpu) = run(prompts, new), run([prompts[0][:1]], 1)
    return wall - start, cpu - start_cpu


def ninth(server: Server, prompts: list[list[int]], new: int) -> float:
    """Seconds to the first token of a client that comes when 8 others are under way."""
    others = [threading.Thread(target=ask, args=(server, prompt, new)) for prompt in prompts[:8]]
    for thread in others:
        thread.start()
    time.sleep(ask(server, prompts[0][:1], 1)[1] + 1)  # until their prompts are computed
    first = ask(server, prompts[8], 1)[1]
    for thread in others:
        thread.join()
    return first


class Bench:
    """One run: its servers, its prompts and its table."""

    def __init__(self, given: argparse.Namespace, stack: ExitStack):
        artifact = load(given.artifact).artifact
        graph, self.parameters = artifact.graph, artifact.parameters
        self.quantization = graph.dtype if graph.quantization == "none" else graph.quantization
        if graph.max_batch < 9:
            sys.exit(f"{given.artifact} has {graph.max_batch} slots; export it with --max-batch 9")
        self.given, self.vocabulary = given, graph.vocabulary
        self.prompts = np.random.default_rng(0).integers(3, self.vocabulary, (32, LENGTH)).tolist()
        self.eight, self.single, self.inexact = (
            stack.enter_context(serving(given.artifact, slots, given.threads, *options))
            for slots, *options in ((8,), (1,), (8, "--no-exact"))
        )
        self.table = Table("what", "tokens/s", "first token, ms", "ratio", "ratio of CPU", title_justify="left")
        for server in (self.eight, self.single, self.inexact):
            press(server, self.prompts[:1], 8)

    def clients(self) -> dict[int, Round]:
        """1 to 32 clients of the server of 8 slots, and one of the other two; ratios to one client of 8 slots."""
        ways = {"1 client, 1 slot": (self.single, 1), "1 client, 8 slots, --no-exact": (self.inexact, 1)}
        ways |= {f"{count} client{'s' * (count > 1)}, 8 slots": (self.eight, count) for count in CLIENTS}
        rounds: dict[str, list[Round]] = {name: [] for name in ways}
        for _ in range(self.given.rounds):
            for name, (server, count) in ways.items():
                rounds[name].append(press(server, self.prompts[:count], self.given.new))
        best = {name: max(loads, key=lambda each: each.rate) for name, loads in rounds.items()}
        one = best["1 client, 8 slots"]
        for name, made in best.items():
            ratios = made.rate / one.rate, made.tokens / made.cpu / (one.tokens / one.cpu)
            self.row(name, made.rate, float(np.median(made.first)), *ratios)
        return {count: best[name] for name, (server, count) in ways.items() if server is self.eight}

    def file(self, eight: Round) -> None:
        """`wm-run generate --prompts` with what 8 clients asked for; ratios of the server to it."""
        wall, cpu = generate(self.given.artifact, self.prompts[:8], self.given.new, self.given.threads)
        tokens = 8 * self.given.new
        self.row("generate --prompts, 8 prompts", tokens / wall, None, eight.rate / (tokens / wall), cpu / eight.cpu)

    def slots(self) -> None:
        """A ninth client while 8 are under way, with a slot for it and without; ratios to a lone client."""
        lone = min(ask(self.eight, prompt, 1)[1] for prompt in self.prompts[:3])
        self.row("first token alone", None, lone, 1.0, None)
        with serving(self.given.artifact, 9, self.given.threads) as nine:
            press(nine, self.prompts[:1], 8)
            for name, server in (("8 busy slots and a free ninth", nine), ("8 busy slots of 8", self.eight)):
                first = ninth(server, self.prompts, self.given.new)
                self.row(name, None, first, first / lone, None)

    def other(self, ours: dict[int, Round]) -> None:
        """The same clients of another server; ratios of ours to it."""
        client = openai.OpenAI(base_url=f"{self.given.url}/v1", api_key="none", max_retries=20, timeout=900)
        server = Server(client, client.models.list().data[0].id)
        press(server, self.prompts[:1], 8)
        draw = np.random.default_rng(1)
        for count in (1, 8):
            loads = []
            for _ in range(self.given.rounds):  # with prompts that it has not read yet: it may keep them
                prompts = draw.integers(3, self.vocabulary, (count, LENGTH)).tolist()
                loads.append(press(server, prompts, self.given.new))
            best = max(loads, key=lambda each: each.rate)
            self.row(
                f"{count} clients of {self.given.url}", best.rate, float(np.median(best.first)),
                ours[count].rate / best.rate, None,
            )  # fmt: skip

    def row(
        self, name: str, rate: float | None, first: float | None, ratio: float | None, of_cpu: float | None
    ) -> None:
        shown = [
            "" if value is None else f"{value * scale:{form}}"
            for value, scale, form in ((rate, 1, ".1f"), (first, 1e3, ".0f"), (ratio, 1, ".2f"), (of_cpu, 1, ".2f"))
        ]
        self.table.add_row(name, *shown)
        print(name, *shown, flush=True)


def plot(found: dict[int, Round], path: Path, title: str) -> None:
    """Tokens/s and the median time to the first token over the number of clients."""
    figure = Figure((7, 4), layout="constrained")
    rates = figure.subplots()
    rates.plot(list(found), [each.rate for each in found.values()], "o-", color="tab:blue")
    rates.set(xscale="log", xlabel="clients", ylabel="tokens/s", ylim=(0, None), title=title)
    rates.set_xticks(CLIENTS, [str(count) for count in CLIENTS])
    rates.minorticks_off()
    rates.yaxis.label.set_color("tab:blue")
    waits = rates.twinx()
    waits.plot(list(found), [np.median(each.first) for each in found.values()], "s--", color="tab:orange")
    waits.set(ylabel="median seconds to the first token", ylim=(0, None))
    waits.yaxis.label.set_color("tab:orange")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    for name, default in (("new", 128), ("rounds", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--url", help="another server of the OpenAI API, to compare with")
    given = parser.parse_args()
    with ExitStack() as stack:
        bench = Bench(given, stack)
        found = bench.clients()
        bench.file(found[8])
        bench.slots()
        if given.url:
            bench.other(found)
        if given.plot:
            name = f"{bench.parameters / 1e6:.0f}M parameters, {bench.quantization}"
            plot(found, given.plot, f"{name}, prompts of {LENGTH}, {given.new} new tokens")
    bench.table.title = f"{given.artifact}, prompts of {LENGTH}, {given.new} new tokens"
    Console(width=120).print(bench.table)


if __name__ == "__main__":
    main()
