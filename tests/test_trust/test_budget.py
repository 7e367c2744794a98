"""What a load may take: more weights than memory, more texts than a configuration has, more time than was given."""

import json
import os
import signal
import subprocess
import sys

import pytest

from runtime import ArtifactError, RequestError, load
from runtime.artifact.integrity import LARGEST_MANIFEST, LARGEST_TEXTS
from runtime.host.budget import Budget
from test_trust.samples import rewrite


def grow_weights(directory, size):
    """Weights that are mostly a hole, with a manifest that says so; their hash is wrong, which takes long to find."""
    os.truncate(directory / "model.onnx.data", size)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["model.onnx.data"]["size"] = size
    path.write_text(json.dumps(manifest))


def test_weights_beyond_memory_are_refused_before_they_are_read(copy, monkeypatch):
    grow_weights(copy, 1 << 42)
    monkeypatch.setattr("runtime.artifact.folder.Folder.sha256", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ArtifactError, match=r"its weights take 4398\.05 GB, and .* GB are available to this load"):
        load(copy)


def test_a_budget_of_bytes(artifact):
    size = (artifact / "model.onnx.data").stat().st_size
    load(artifact, max_bytes=size)
    with pytest.raises(ArtifactError, match="larger max_bytes"):
        load(artifact, max_bytes=size - 1)
    for options in ({"max_bytes": 0}, {"max_seconds": -1.0}, {"max_seconds": float("nan")}):
        with pytest.raises(RequestError, match="expected more than 0"):
            load(artifact, **options)


def test_a_budget_of_time_ends_the_hashing(copy):
    grow_weights(copy, 1 << 40)
    with pytest.raises(ArtifactError, match="more than max_seconds = 1"):
        load(copy, max_bytes=1 << 41, max_seconds=1)


@pytest.mark.parametrize("signed", [False, True])
def test_ctrl_c_ends_the_hashing(copy, signed):
    """A terabyte would take minutes: the process ends with KeyboardInterrupt once it is told."""
    grow_weights(copy, 1 << 40)
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
from runtime.artifact.integrity import open_artifact
from runtime.host.budget import Budget
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
with open_artifact(Path(sys.argv[1]), budget=Budget(1 << 41)) as artifact:
    while not {signed}:
        time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the tests themselves ignore it
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_work_in_another_thread_is_left_when_the_time_is_over():
    stopped = []
    budget = Budget(max_seconds=0.2)
    with pytest.raises(ArtifactError, match=r"max_seconds = 0\.2"):
        budget.run(lambda: [None for _ in iter(lambda: bool(stopped), True)], lambda: stopped.append(1))
    assert stopped
    assert Budget().run(lambda: 7, lambda: None) == 7
    with pytest.raises(KeyError):
        Budget().run(lambda: {}["absent"], lambda: None)


def test_many_texts_are_refused_by_their_sum(copy):
    """Texts of a configuration's size are held, so their sum is bounded; larger ones are hashed and not held."""
    large = copy / "large.json"
    large.write_bytes(b" " * (LARGEST_MANIFEST + 1))
    rewrite(copy, lambda manifest: manifest["files"].update({"large.json": {"size": 0, "sha256": "0" * 64}}))
    rewrite(copy)
    assert "large.json" not in load(copy).artifact.texts
    names = [f"{number}.json" for number in range(LARGEST_TEXTS // LARGEST_MANIFEST + 1)]
    for name in names:
        (copy / name).write_bytes(b" " * LARGEST_MANIFEST)
    rewrite(copy, lambda manifest: manifest["files"].update({name: {"size": 0, "sha256": "0" * 64} for name in names}))
    rewrite(copy)
    with pytest.raises(ArtifactError, match=r"its texts have .* bytes; expected up to"):
        load(copy)
