"""Sequences of random length join and leave the slots for a long time: memory, drift and step times.

PYTHONPATH=tests python -m test_trust.soak [--steps N] [--sequences N] [--slots N]
"""

import argparse
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from runtime import load


@dataclass
class Soak:
    """What a run came to: sequences whose tokens differ from their solo run, and bytes.

    `clock` and `cpu` are the seconds of every step: as they pass, which other processes lengthen, and of this thread.
    """

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
    mean = max(2, round(1.02 * steps * slots / sequences))  # new tokens of a sequence
    longest = engine.graph.max_length
    plan = []
    for _ in range(sequences):
        new = min(int(draw.integers(mean // 2, mean + mean // 2 + 1)), longest - 1)
        prompt = draw.integers(0, engine.graph.vocabulary, int(draw.integers(1, max(2, longest - new))))
        plan.append((prompt[: longest - new], new))
    engine.reserve(slots, longest)
    # all that is noted on the way, in memory from the start
    said, counts = np.full((sequences, longest), -1, np.int32), np.zeros(sequences, np.int64)
    clock, cpu = np.full(2 * steps, -1.0), np.full(2 * steps, -1.0)
    waiting, running = list(range(sequences)), {}
    taken, warm = 0, 0
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting:
                index = running[slot] = waiting.pop()
                said[index, 0], counts[index] = engine.join(slot, plan[index][0]).argmax(), 1
        ids, active = np.zeros((slots, 1), np.int64), np.zeros(slots, np.int64)
        for slot, index in running.items():
            ids[slot], active[slot] = said[index, counts[index] - 1], 1
        started, worked = time.perf_counter(), time.thread_time()
        logits = engine.prefill(ids, active)
        cpu[taken] = time.thread_time() - worked
        clock[taken] = time.perf_counter() - started
        taken += 1
        for slot, index in list(running.items()):
            said[index, counts[index]] = logits[slot].argmax()
            counts[index] += 1
            if counts[index] >= plan[index][1]:
                engine.leave(slot)
                del running[slot]
        if len(waiting) > sequences * 9 // 10:
            warm = resident()
    held = resident()
    engine = load(artifact, threads=1)
    differing = sum(
        engine.generate_ids(prompt.tolist(), count) != row[:count].tolist()
        for (prompt, _), row, count in zip(plan, said, counts.tolist(), strict=True)
    )
    return Soak(sequences, differing, warm, held, clock[:taken], cpu[:taken])


def resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def percentiles(seconds: np.ndarray) -> str:
    median, p99 = np.median(seconds), np.quantile(seconds, 0.99)
    return f"{median * 1e3:.3f} ms median, {p99 * 1e3:.3f} ms p99 ({p99 / median:.1f} times)"


def make(root: str) -> Path:
    from test_trust.samples import make_artifact

    return make_artifact(Path(root))


def main() -> None:
    parser = argparse.ArgumentParser(description="Sequences join and leave for a long time.")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--sequences", type=int, default=5_000)
    parser.add_argument("--slots", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        # in another process, so that this one has the runtime alone in memory
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            artifact = other.submit(make, root).result()
        found = soak(artifact, options.steps, options.sequences, options.slots)
    print(
        f"{len(found.cpu)} steps, {found.sequences} sequences, {found.differing} differ from their solo run; resident "
        f"{found.resident_after_warm_up / 1e6:.1f} MB after a tenth, {found.growth:+.2%} at the end; "
        f"a step: {percentiles(found.clock)} on the clock, {percentiles(found.cpu)} of CPU time"
    )


if __name__ == "__main__":
    main()
