"""A bounded share of what `python -m test_trust.fuzz` does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_trust import fuzz
from test_trust.loaders import TARGETS, Manifests

RUNS = {
    "manifests": 300,
    "engines": 200,
    "graphs": 200,
    "checkpoints": 60,
    "adapters": 30,
    "tokenizers": 60,
    "templates": 60,
    "prompts": 300,
    "recipes": 300,
    "calls": 300,
}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_structures(name, tmp_path):
    target = TARGETS[name](tmp_path)
    fuzz.run(target, RUNS[name], seed=0)
    assert target.outcomes.total() >= RUNS[name]
    # About half of the changes to a graph mean nothing to it: doc strings, names, fields that keep their defaults.
    assert target.outcomes["loaded"] < target.outcomes.total() * 2 / 3


@pytest.mark.skipif(
    not importlib.util.find_spec("atheris"), reason="atheris is not installed: pip install -e '.[fuzz]'"
)
@pytest.mark.parametrize(("name", "runs"), [("manifests", 2000), ("graphs", 500)])
def test_led_by_coverage(name, runs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-P", "-m", "test_trust.fuzz", name, "--runs", str(runs), "--coverage"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{runs} files" in done.stdout


def test_the_checks_can_fail(tmp_path):
    """A loader that takes a damaged file for a bug, writes a file, or says nothing, is noticed."""
    target = Manifests(tmp_path)
    for fault, kind in ((OSError("no"), OSError), (target.expected[0]("two\nlines"), AssertionError)):

        def load(fault=fault):
            raise fault

        target.load = load
        with pytest.raises(kind):
            target.check(target.sound)
    target.load = lambda: (target.directory / "new").write_text("x")
    with pytest.raises(AssertionError, match="written"):
        target.check(target.sound)
