"""Make every change of a file fail while an artifact is written, and look at what is left.

    PYTHONPATH=tests python -m test_trust.faults [JOB] [--every N] [--kills N] [--seed S]

JOB is export, verify or sign. Each runs in a fork of this process, under a preloaded library (faults.c) that lets the
n-th change fail with ENOSPC or EIO, or kills the process there; `--kills` more are killed at a random time. Afterwards
the old artifact is there whole, or the new one; and running the job again succeeds and leaves nothing beside it.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from export import export_onnx, sign, verify
from runtime.artifact import read_artifact

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "kill": 0}
OLD, NEW = 60, 50  # the artifacts' capacities tell them apart
LONGEST = 120.0  # seconds


class Jobs:
    """What writes artifacts, made ready so that a fork has little to do but write."""

    def __init__(self, root: Path):
        from test_trust.samples import make_checkpoint
        from test_trust.test_signature import write_keys

        torch.set_num_threads(1)  # a fork has no other threads
        self.root = root
        self.place = root / "place"  # where changes are counted
        self.out = self.place / "out"
        self.old, self.source = root / "old", make_checkpoint(root / "checkpoint")
        self.key, _ = write_keys(root, "key")
        export_onnx(self.source, self.old, max_length=OLD, max_batch=2)
        self.prepared = ExitStack()
        self._remember("export.onnx.references", "export.onnx.lower")
        export_onnx(self.source, root / "new", max_length=NEW, max_batch=2)
        self._remember("export.verify.references")
        self.reset()
        verify(self.out)
        self.jobs: dict[str, Callable[[], object]] = {
            "export": lambda: export_onnx(self.source, self.out, max_length=NEW, max_batch=2, force=True),
            "verify": lambda: verify(self.out),
            "sign": lambda: sign(self.out, self.key),
        }

    def _remember(self, *names: str) -> None:
        """Let these functions compute once: their results do not depend on the disk."""
        for name in names:
            module, function = name.rsplit(".", 1)
            real, results = getattr(sys.modules[module], function), []

            def once(*args: object, real=real, results=results, **kwargs: object) -> object:
                if not results:
                    results.append(real(*args, **kwargs))
                return results[0]

            self.prepared.enter_context(mock.patch(name, once))

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.old, self.out)

    def run(self, name: str, at: int = 0, fault: int = 0, kill_after: float | None = None) -> int:
        """Run a job in a fork: its exit status, 0 done, 1 an OSError or ValueError, 2 anything else, -9 killed."""
        child = os.fork()
        if child == 0:
            settings = {"FAULT_ROOT": self.place, "FAULT_AT": at, "FAULT_ERRNO": fault}
            os.environ.update({key: str(value) for key, value in settings.items()})
            status = 2
            try:
                self.jobs[name]()
                status = 0
            except (OSError, ValueError):
                status = 1
            finally:
                del os.environ["FAULT_ROOT"]
                os._exit(status)
        started = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - started
            if passed > LONGEST or (kill_after is not None and passed > kill_after):
                os.kill(child, signal.SIGKILL)
                kill_after = None
            time.sleep(0.002)

    def check(self, name: str, status: int) -> str:
        """What is left: the old artifact or the new, whole. Raises AssertionError for anything else."""
        length = read_artifact(self.out).graph.max_length
        assert length in (OLD, NEW), length
        assert name == "export" or length == OLD
        beside = [path.name for path in self.place.iterdir() if path != self.out]
        # what a killed process could not remove, or a failing disk did not, is swept away by the next
        assert all(name.startswith(".out.") and name.endswith(".partial") for name in beside), beside
        state = "old" if length == OLD else "new"
        assert self.run(name) == 0, "the job does not succeed afterwards"
        assert read_artifact(self.out).graph.max_length == (NEW if name == "export" else OLD)
        assert [path.name for path in self.place.iterdir()] == ["out"]
        left = sorted(path.name for path in self.out.iterdir() if path.name.startswith("."))
        assert not left, left
        return state


def changes(jobs: Jobs, name: str) -> int:
    """How many changes of files the job makes."""
    low, high = 0, 1
    while True:  # the first number at which nothing fails any more
        jobs.reset()
        if jobs.run(name, high) == 0:
            break
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        jobs.reset()
        if jobs.run(name, middle) == 0:
            high = middle
        else:
            low = middle
    return low


def attack(jobs: Jobs, name: str, every: int, kills: int, seed: int) -> Counter[tuple[str, str]]:
    """Every `every`-th change fails in each way, and `kills` more runs are killed; counts of (fault, what was left)."""
    draw, outcomes = random.Random(seed), Counter()
    points = changes(jobs, name)
    for number, (kind, fault) in enumerate(FAULTS.items()):
        for at in range(1 + number % every, points + 1, every):
            jobs.reset()
            status = jobs.run(name, at, fault)
            assert status in ((-signal.SIGKILL,) if kind == "kill" else (0, 1)), f"{kind} at {at}: exit status {status}"
            outcomes[kind, jobs.check(name, status)] += 1
    jobs.reset()
    started = time.monotonic()
    assert jobs.run(name) == 0
    whole = time.monotonic() - started
    for _ in range(kills):
        jobs.reset()
        status = jobs.run(name, kill_after=draw.uniform(0, whole))
        assert status in (0, -signal.SIGKILL), status
        outcomes["random kill", jobs.check(name, status)] += 1
    return outcomes


def preloaded(root: Path) -> dict[str, str]:
    """The environment in which changes can fail; compiles the library. Raises FileNotFoundError without a compiler."""
    library = root / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make every change of a file fail while an artifact is written.")
    parser.add_argument("job", choices=["export", "verify", "sign"], nargs="?", default="export")
    parser.add_argument("--every", type=int, default=1, help="let only every n-th change fail")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
            command = [sys.executable, "-m", "test_trust.faults", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=preloaded(Path(name)), check=False).returncode)
        started = time.monotonic()
        outcomes = attack(Jobs(Path(name).resolve()), options.job, options.every, options.kills, options.seed)
        for (kind, state), count in sorted(outcomes.items()):
            print(f"{options.job}: {count} times {kind}: the {state} artifact is there, whole")
        print(f"{outcomes.total()} faults, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
