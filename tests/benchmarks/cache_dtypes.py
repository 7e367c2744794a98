"""Decode beside another artifact of the same model whose keys and values have another dtype, in interleaved rounds.

    python tests/benchmarks/cache_dtypes.py FLOAT_DIR INT8_DIR --slots 8 --tokens 4096

Both are exported from one checkpoint, with and without `--kv-cache-dtype int8`. Prints CPU milliseconds a step and the
caches' megabytes: of each artifact, and as a share of the first's. All ids are 1: no kernel's time depends on them.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from runtime.artifact.integrity import read_artifact
from runtime.backends.base import Options
from runtime.backends.ort_cpu import OnnxSession
from runtime.backends.registry import BACKENDS

ROUNDS, STEPS = 21, 2


def opened(directory: Path, slots: int, tokens: int) -> OnnxSession:
    """A session whose slots have room for `tokens` tokens and the next one."""
    session = BACKENDS["cpu"].open(read_artifact(directory), Options(threads=1))
    assert isinstance(session, OnnxSession)
    session.allocate(slots, tokens + 1)
    session.grow(next(capacity for capacity in session.graph.capacities if capacity > tokens))
    return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs=2, type=Path)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    sessions = [opened(directory, arguments.slots, arguments.tokens) for directory in arguments.directories]
    ids = np.ones((arguments.slots, 1), np.int64)
    held, new = np.full(arguments.slots, arguments.tokens, np.int64), np.ones(arguments.slots, np.int64)
    taken: list[list[float]] = [[] for _ in sessions]
    for turn in range(ROUNDS + 1):
        for session, times in zip(sessions, taken, strict=True):
            began = time.process_time()
            for _ in range(STEPS):
                session.step(ids, held, new)
            if turn:  # the first round warms up
                times.append((time.process_time() - began) / STEPS)
    seconds = [float(np.median(times)) for times in taken]
    sizes = [sum(flat.nbytes for flat in session.memory) for session in sessions]
    for directory, each, size in zip(arguments.directories, seconds, sizes, strict=True):
        print(
            f"{directory}: {each * 1e3:.1f} ms a step ({each / seconds[0]:.2f} times), "
            f"caches {size / 1e6:.1f} MB ({size / sizes[0]:.0%})"
        )


if __name__ == "__main__":
    main()
