"""Make every change of a file fail while an artifact or a checkpoint is written, and look at what is left.

    PYTHONPATH=tests python -m test_trust.faults [JOB] [--every N] [--kills N] [--seed S]

JOB is export, verify, sign or train. Each runs in a fork of this process, under a preloaded library (faults.c) that
lets the n-th change fail with ENOSPC or EIO, or kills the process there; `--kills` more are killed at a random time.
Afterwards the old artifact is there whole, or the new one; of a training run, its last checkpoint, whole, or the
finished model. Running the job again succeeds, ends as if nothing had been, and leaves nothing beside it.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console

from export import OnnxOptions, export_onnx, sign, verify
from runtime.artifact.integrity import read_artifact
from wm_models.training import Recipe, train
from wm_models.training.trainer import KEPT_CHECKPOINTS

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "kill": 0}
OLD, NEW = 60, 50  # the artifacts' capacities tell them apart
LONGEST = 120.0  # seconds
COUNT = "count"  # the file where a fork leaves how many changes it made


class Jobs:
    """What writes below `place`, made ready so that a fork has little to do but write."""

    def __init__(self, root: Path):
        torch.set_num_threads(1)  # a fork has no other threads
        self.root, self.place = root, root / "place"  # where changes are counted
        self.out = self.place / "out"
        self.prepared = ExitStack()
        self.jobs: dict[str, Callable[[], object]] = {}

    def reset(self) -> None:
        """What is there before the job."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def check(self, name: str) -> str:
        """Say what is left, after a second look at it: the job is run again. Raises AssertionError."""
        raise NotImplementedError

    def remember(self, *names: str) -> None:
        """Let these functions compute once: their results do not depend on the disk."""
        for name in names:
            module, function = name.rsplit(".", 1)
            real, results = getattr(sys.modules[module], function), []

            def once(*args: object, real=real, results=results, **kwargs: object) -> object:
                if not results:
                    results.append(real(*args, **kwargs))
                return results[0]

            self.prepared.enter_context(mock.patch(name, once))

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
            except BaseException:
                traceback.print_exc()
            finally:
                del os.environ["FAULT_ROOT"]
                (self.root / COUNT).write_text(str(ctypes.CDLL(None).fault_count()))
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


class ArtifactJobs(Jobs):
    """Over an old artifact: a verification, a signature."""

    def __init__(self, root: Path):
        from test_trust.samples import make_checkpoint
        from test_trust.test_signature import write_keys

        super().__init__(root)
        self.old, self.source = root / "old", make_checkpoint(root / "checkpoint")
        self.key, _ = write_keys(root, "key")
        export_onnx(self.source, self.old, OnnxOptions(max_length=OLD, max_batch=2))
        self.prepare()
        self.reset()

    def prepare(self) -> None:
        """Let what the jobs compute be remembered."""
        self.remember("export.verification.judging.references")
        verify(self.old)
        self.jobs = {"verify": lambda: verify(self.out), "sign": lambda: sign(self.out, self.key)}

    def reset(self) -> None:
        super().reset()
        shutil.copytree(self.old, self.out)

    def check(self, name: str) -> str:
        length = read_artifact(self.out).graph.max_length
        assert length in (OLD, NEW), length
        assert name == "export" or length == OLD
        beside = [path.name for path in self.place.iterdir() if path != self.out]
        # what a killed process could not remove, or a failing disk did not, is swept away by the next
        assert all(name.startswith(".out.") and name.endswith(".partial") for name in beside), beside
        assert self.run(name) == 0, "the job does not succeed afterwards"
        assert read_artifact(self.out).graph.max_length == (NEW if name == "export" else OLD)
        assert [path.name for path in self.place.iterdir()] == ["out"]
        left = sorted(path.name for path in self.out.iterdir() if path.name.startswith("."))
        assert not left, left
        return f"the {'old' if length == OLD else 'new'} artifact, whole"


class ExportJobs(ArtifactJobs):
    """Over an old artifact: an export of a new one."""

    def prepare(self) -> None:
        self.remember("export.targets.onnx_artifact.references", "export.targets.onnx_artifact.lower")
        options = OnnxOptions(max_length=NEW, max_batch=2)
        with mock.patch("export.targets.onnx_artifact.release_weights"):  # the jobs' exports write this graph again
            export_onnx(self.source, self.root / "new", options)
        self.jobs = {"export": lambda: export_onnx(self.source, self.out, options, force=True)}


class TrainingJobs(Jobs):
    """A run of three steps, a checkpoint after each, of which two are kept."""

    def __init__(self, root: Path):
        from test_training.conftest import TINY, write_corpus

        super().__init__(root)
        (root / "corpus").mkdir()
        changed = {
            "steps": 3,
            "save_every": 1,
            "device_batch_size": 4,
            "model": {**TINY["model"], "num_hidden_layers": 1},
        }
        recipe = Recipe(**{**TINY, **changed, "data": [str(write_corpus(root / "corpus"))]})
        self.expected = root / "expected"
        silent = Console(quiet=True)
        with mock.patch("wm_models.training.trainer.KEPT_CHECKPOINTS", 3):
            train(recipe, self.expected, console=silent)
        self.remember("wm_models.training.run.prepare")
        train(recipe, root / "warm", console=silent)
        # as a person does: with --resume once the run has begun
        self.jobs = {"train": lambda: train(recipe, self.out, (self.out / "recipe.toml").exists(), silent)}

    def check(self, name: str) -> str:
        finished, last = self._finished(), self._last()
        assert self.run(name) == 0, "the job does not succeed afterwards"
        assert self._finished()
        assert self._last() == 3
        assert sorted(path.name for path in (self.out / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
        for path in (self.out / "checkpoints").iterdir():
            assert _history(path) == _history(self.expected / "checkpoints" / path.name)
        assert _names(self.out) == _names(self.expected)
        return "the finished model, whole" if finished else f"checkpoint {last}, whole" if last else "no checkpoint yet"

    def _finished(self) -> bool:
        """Whether there is a model that loads: then it must be the whole one."""
        if not (self.out / "config.json").exists():
            return False
        _same(self.out, self.expected, set(_names(self.expected)) - {"checkpoints", "logs"})
        return True

    def _last(self) -> int:
        """The last checkpoint's step, or 0. It is as it should be, and so is the one before it."""
        folder = self.out / "checkpoints"
        found = sorted(folder.glob("checkpoint-*")) if folder.exists() else []
        for path in found[-KEPT_CHECKPOINTS:]:  # an older one is being deleted
            expected = self.expected / "checkpoints" / path.name
            assert _names(path) == _names(expected), path.name
            _same(
                path, expected, {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "tokenizer.json"}
            )
        return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _same(found: Path, expected: Path, names: set[str]) -> None:
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def _history(checkpoint: Path) -> list[dict[str, float]]:
    """A run's losses so far, without what depends on the clock."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry} for entry in history]


JOBS: dict[str, type[Jobs]] = {
    "export": ExportJobs, "verify": ArtifactJobs, "sign": ArtifactJobs, "train": TrainingJobs,
}  # fmt: skip


def changes(jobs: Jobs, name: str) -> int:
    """How many changes of files the job makes."""
    jobs.reset()
    assert jobs.run(name) == 0
    return int((jobs.root / COUNT).read_text())


def attack(jobs: Jobs, name: str, every: int, kills: int, seed: int) -> Counter[tuple[str, str]]:
    """Every `every`-th change fails in each way, and `kills` more runs are killed; counts of (fault, what was left)."""
    draw, outcomes = random.Random(seed), Counter()
    points = changes(jobs, name)
    for number, (kind, fault) in enumerate(FAULTS.items()):
        for at in range(1 + number % every, points + 1, every):
            jobs.reset()
            status = jobs.run(name, at, fault)
            assert status in ((-signal.SIGKILL,) if kind == "kill" else (0, 1)), f"{kind} at {at}: exit status {status}"
            outcomes[kind, jobs.check(name)] += 1
    jobs.reset()
    started = time.monotonic()
    assert jobs.run(name) == 0
    whole = time.monotonic() - started
    for _ in range(kills):
        jobs.reset()
        status = jobs.run(name, kill_after=draw.uniform(0, whole))
        assert status in (0, -signal.SIGKILL), status
        outcomes["random kill", jobs.check(name)] += 1
    return outcomes


def preloaded(root: Path) -> dict[str, str]:
    """The environment in which changes can fail; compiles the library. Raises FileNotFoundError without a compiler."""
    library = root / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make every change of a file fail while something is written.")
    parser.add_argument("job", choices=JOBS, nargs="?", default="export")
    parser.add_argument("--every", type=int, default=1, help="let only every n-th change fail")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
            command = [sys.executable, "-P", "-m", "test_trust.faults", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=preloaded(Path(name)), check=False).returncode)
        started = time.monotonic()
        outcomes = attack(
            JOBS[options.job](Path(name).resolve()), options.job, options.every, options.kills, options.seed
        )
        for (kind, state), count in sorted(outcomes.items()):
            print(f"{options.job}: {count} times {kind}, which left {state}")
        print(f"{outcomes.total()} faults, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
