"""Compiler passes, each held against the graph that it rewrites."""

import shutil

import numpy as np
import onnx_ir as ir
import pytest
from conftest import baseline, ours
from test_trust.samples import rewrite

from export.rewrites.narrow_float64 import narrow_float64
from runtime import load
from test_export.conftest import lowered

KEEP, LENGTH = 20, 120


@pytest.fixture(scope="module", params=[{}, {"attention_bias": True}], ids=["plain", "biased"])
def selecting(request, tmp_path_factory):
    """An artifact that leaves keys out, evicts rows, and so computes its biases in float64."""
    model = ours(baseline(keep_window_size=KEEP, eos_token_id=None, **request.param), expert_routing="token")
    return lowered(tmp_path_factory.mktemp("selecting") / "artifact", model, max_length=LENGTH, spare=12).path


def logits(path, ids):
    engine = load(path, threads=1)
    return np.concatenate([engine.prefill(ids[:, :50]), *(engine.decode(ids[:, at]) for at in range(50, LENGTH))])


def test_float64_narrowed(selecting, tmp_path):
    """No float64 is left, and repeated tokens, whose keys tie, give the same logits."""
    directory = shutil.copytree(selecting, tmp_path / "copy")
    model = narrow_float64(ir.load(directory / "model.onnx"))
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    assert not [value.name for value in values if value.dtype == ir.DataType.DOUBLE]
    assert not [node for node in model.graph if node.op_type == "Pow"]
    ir.save(model, directory / "model.onnx")
    rewrite(directory)
    ids = np.random.default_rng(0).integers(0, 30, (1, LENGTH))
    np.testing.assert_allclose(logits(directory, ids), logits(selecting, ids), rtol=0, atol=2e-5)


def test_a_graph_without_float64_stays(exported):
    path = exported("dense")[1] / "model.onnx"
    before, after = ir.load(path), narrow_float64(ir.load(path))
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    assert after.graph.initializers.keys() == before.graph.initializers.keys()
