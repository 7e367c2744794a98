"""Feed damaged files to the loaders: each is loaded or refused with the loader's own error, and nothing else happens.

    PYTHONPATH=tests python -m test_trust.fuzz TARGET [--runs N] [--seed S] [--coverage]

TARGET is a name in `TARGETS`. Hypothesis changes a sound file's structure; with `--coverage`, atheris changes its
bytes, led by which lines of the loader they reach. Stops at the first crash, at an error of another kind, a hang over
5 s, memory above 1 GB, or a file that was written.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import hypothesis

from test_trust.loaders import TARGETS, Target, peak_memory

BATCH = 1000


def run(target: Target, runs: int, seed: int) -> None:
    """Hypothesis's mutations, in batches: it remembers all examples of one."""
    for start in range(0, runs, BATCH):

        @hypothesis.seed(seed + start)
        @hypothesis.settings(
            max_examples=min(BATCH, runs - start), database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(target.changed(target.sound))
        def attack(data: bytes) -> None:
            target.check(data)

        attack()


def run_with_coverage(target: Target, runs: int, seed: int) -> None:
    """atheris's mutations; leaves the process when it is done."""
    import atheris

    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "sound").write_bytes(target.sound)
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=100000", "-rss_limit_mb=0", "-verbosity=0", corpus]

        def attack(data: bytes) -> None:
            target.check(data)
            if target.outcomes.total() == runs:
                report(target)

        atheris.Setup([sys.argv[0], *options], attack)
        atheris.Fuzz()


def report(target: Target) -> None:
    outcomes = ", ".join(f"{count} {name}" for name, count in target.outcomes.most_common())
    grown = (peak_memory() - target.before) / 1e6
    print(f"{type(target).__name__}: {target.outcomes.total()} files: {outcomes}; peak memory grew by {grown:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed damaged files to the loaders.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="lead the mutations by coverage, with atheris")
    options = parser.parse_args()
    if options.coverage:
        import atheris

        with atheris.instrument_imports(include=["runtime", "wm_models.checkpoint"]):
            importlib.import_module("runtime")
            importlib.import_module("wm_models")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        target = TARGETS[options.target](Path(root))
        if options.coverage:
            run_with_coverage(target, options.runs, options.seed)
        run(target, options.runs, options.seed)
        report(target)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
