"""Sequences of random length join and leave the slots for a long time: memory, drift and step times.

PYTHONPATH=tests python -m test_trust.soak [--steps N] [--sequences N] [--slots N]
"""

import argparse
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import load
from test_trust.samples import make_artifact


@dataclass
class Soak:
    """What a run came to: steps taken, sequences whose tokens differ from their solo run, bytes.

    `clock` and `cpu` are the seconds of every step: as they pass, which other processes lengthen, and of this thread.
    """

    steps: int
    sequences: int
    differing: int
    resident_after_warm_up: int
    resident_at_end: int
    clock: np.ndarray
    cpu: np.ndarray

    @property
    def growth(self) -> float:
        return self.resident_at_end / self.resident_after_warm_up - 1


def soak(artifact: Path, steps: int, sequences: int, slots: int = 4, seed: int = 0) -> Soak:
    """At least `steps` decode steps over `sequences`, greedy, then each sequence alone in an engine of its own."""
    engine, draw = load(artifact, threads=1), np.random.default_rng(seed)
    mean = max(2, round(steps * slots / sequences))  # new tokens of a sequence
    longest = engine.graph.max_length
    plan = []
    for _ in range(sequences):
        new = int(draw.integers(mean // 2, mean + mean // 2 + 1))
        prompt = draw.integers(0, engine.graph.vocabulary, int(draw.integers(1, max(2, longest - new)))).tolist()
        plan.append((prompt[: longest - new], new))
    engine.reserve(slots, longest)
    waiting, running = list(range(sequences)), {}
    said: list[list[int]] = [[] for _ in plan]
    clock, cpu, warm = [], [], 0
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting:
                running[slot] = waiting.pop()
                said[running[slot]].append(int(engine.join(slot, plan[running[slot]][0]).argmax()))
        ids, active = np.zeros((slots, 1), np.int64), np.zeros(slots, np.int64)
        for slot, index in running.items():
            ids[slot], active[slot] = said[index][-1], 1
        started, worked = time.perf_counter(), time.thread_time()
        logits = engine.prefill(ids, active)
        cpu.append(time.thread_time() - worked)
        clock.append(time.perf_counter() - started)
        for slot, index in list(running.items()):
            said[index].append(int(logits[slot].argmax()))
            if len(said[index]) >= plan[index][1]:
                engine.leave(slot)
                del running[slot]
        if len(waiting) > sequences * 9 // 10:
            warm = resident()
    held = resident()
    engine = load(artifact, threads=1)
    differing = sum(
        engine.generate_ids(prompt, len(said[index])) != said[index] for index, (prompt, _) in enumerate(plan)
    )
    return Soak(len(cpu), sequences, differing, warm, held, np.array(clock), np.array(cpu))


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Sequences join and leave for a long time.")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--sequences", type=int, default=5_000)
    parser.add_argument("--slots", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = soak(make_artifact(Path(root)), options.steps, options.sequences, options.slots)
    print(
        f"{found.steps} steps, {found.sequences} sequences, {found.differing} differ from their solo run; resident "
        f"{found.resident_after_warm_up / 1e6:.1f} MB after a tenth, {found.growth:+.2%} at the end; "
        f"a step: {percentiles(found.clock)} on the clock, {percentiles(found.cpu)} of CPU time"
    )


def percentiles(seconds: np.ndarray) -> str:
    median, p99 = np.median(seconds), np.quantile(seconds, 0.99)
    return f"{median * 1e3:.2f} ms median, {p99 * 1e3:.2f} ms p99 ({p99 / median:.1f} times)"


if __name__ == "__main__":
    main()
