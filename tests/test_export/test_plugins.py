"""The steps of export/README.md, followed from outside the packages: a target and a quantisation scheme."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.quantization.schemes import SCHEMES
from export.targets.registry import TARGETS
from runtime import load
from test_export.conftest import save_checkpoint
from test_export.toy import LISTED, POWERS


def command(*arguments):
    paths = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, "-m", "test_export.toy", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.fixture
def wm_export(typed, monkeypatch):
    """The command line in this process, with both."""
    monkeypatch.setitem(TARGETS, LISTED.name, LISTED)
    monkeypatch.setitem(SCHEMES, POWERS.name, POWERS)
    return partial(typed, "export")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("toy") / "checkpoint")


@pytest.fixture(scope="module")
def listed(checkpoint):
    done = command("listed", checkpoint, "--out", checkpoint.parent / "listed", "--max-length", 70)
    assert done.returncode == 0, done.stderr
    assert "listed: " in done.stdout
    return checkpoint.parent / "listed"


def test_a_target_is_a_subcommand_and_its_artifact_is_verified_and_loads(listed, wm_export):
    manifest = json.loads((listed / "manifest.json").read_text())
    assert manifest["verified"] is True
    assert manifest["listing"]["file"] in manifest["files"]
    assert json.loads((listed / "verification.json").read_text())["target"] == "listed"
    engine = load(listed)
    assert engine.graph.max_length == 70
    assert len(engine.generate_ids([1, 2, 3], 5)) == 5
    shown = wm_export("inspect", listed).stdout
    assert "operators.txt" in shown
    assert "Listing" in shown


def test_verification_loads_the_artifact_through_its_target(listed, wm_export, checkpoint, tmp_path):
    assert "verified" in wm_export("verify", listed).stdout
    done = wm_export("listed", checkpoint, "--out", tmp_path / "out", "--forget", "Attention")
    assert done.returncode == 2
    assert "is not the listing of this graph" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_artifact_of_a_target_that_is_not_registered_says_so(listed, typed):
    done = typed("export", "verify", listed)
    assert done.returncode == 2
    assert "'listed' is no target of wm-export; expected one of onnx, tensorrt" in done.stderr


def test_a_scheme_is_a_choice_of_quantize_and_its_artifact_is_verified_and_loads(wm_export, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = wm_export("onnx", checkpoint, "--out", out, "--quantize", "powers", "--max-length", 80, "--max-batch", 2)
    assert done.returncode == 0, done.stderr
    assert "(limit 6e-03)" in done.stdout
    assert load(out).graph.quantization == "powers"
    assert len(load(out).generate_ids([1, 2, 3], 5)) == 5
    graph = ir.load(out / "model.onnx").graph
    nodes = [node for node in graph if node.op_type == "DequantizeLinear"]
    assert {node.attributes["block_size"].as_int() for node in nodes} == {64, 32}  # 96 columns divide by 32 alone
    scales = np.concatenate([node.inputs[1].const_value.numpy().ravel() for node in nodes])
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(scales))), scales)


def test_a_scheme_that_is_not_registered_is_refused_by_name(wm_export, checkpoint, tmp_path):
    done = wm_export("onnx", checkpoint, "--out", tmp_path / "out", "--quantize", "int3")
    assert done.returncode == 2
    assert "--quantize is 'int3'" in done.stderr
    assert "int8, int4, powers" in done.stderr
