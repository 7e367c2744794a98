"""Checkpoints of every published generation as artifacts: exported from the files as they were published, verified."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import golden

from export import ExportError, export_onnx
from runtime import load
from wm_models import DogeForSequenceClassification

# Each with what the others lack: product keys and dynamic RoPE; dropped keys; biases; selection; a bias turned off.
NAMES = ("doge-2025-01-cdmoe", "doge-2025-01-mask-ratio", "doge-2025-01-bias", "doge-2025-08-keep-window")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exported_and_verified(name, tmp_path):
    reference = golden(name)
    verdicts = export_onnx(reference.save(tmp_path / "checkpoint"), tmp_path / "artifact", max_length=60, logits="all")
    assert len(verdicts) >= 5
    assert all(verdict.passed for verdict in verdicts)
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text())["model"]["type"] == "wm_doge"
    engine = load(tmp_path / "artifact")
    ids, expected = reference.inputs["input_ids"].numpy(), reference.outputs["logits"].numpy()
    if name != "doge-2025-08-keep-window":  # whose reference keeps other keys of equal bias
        found = engine.prefill(ids, [ids.shape[1]] * len(ids))
        np.testing.assert_allclose(found, expected[:, -1], atol=1e-4)


def test_batch_routing_is_refused_with_what_changes_it(tmp_path):
    checkpoint = golden("doge-2025-04-cdmoe").save(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"mixes the tokens of a batch.*\"expert_routing\": \"token\" in config.json"):
        export_onnx(checkpoint, tmp_path / "artifact")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "expert_routing": "token"}))
    assert all(verdict.passed for verdict in export_onnx(checkpoint, tmp_path / "artifact", max_length=60))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@torch.no_grad()
def test_a_classifier_as_onnx(tmp_path):
    reference = golden("doge-2025-01-classification")
    model = DogeForSequenceClassification.from_pretrained(reference.save(tmp_path))
    ids, open_dims = reference.inputs["input_ids"], {0: "batch", 1: "length"}
    program = torch.onnx.export(
        Logits(model), (ids,), dynamo=True, opset_version=24, verbose=False, dynamic_shapes=(open_dims,)
    )
    program.save(tmp_path / "classifier.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "classifier.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((3, 12), (1, 30), (5, 2)):
        ids = torch.randint(3, 61, (batch, length))
        found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
        np.testing.assert_allclose(found, model(ids).logits.numpy(), atol=1e-5)
