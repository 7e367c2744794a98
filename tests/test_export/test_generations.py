"""Checkpoints of every published generation as artifacts: exported from the files as they were published, verified."""

import json

import numpy as np
import pytest
import torch
from conftest import golden

from export import ExportError, OnnxOptions, export_onnx
from runtime import load
from wm_models import DogeForSequenceClassification

# Each with what the others lack: product keys and dynamic RoPE; dropped keys; biases; selection; a bias turned off.
NAMES = ("doge-2025-01-cdmoe", "doge-2025-01-mask-ratio", "doge-2025-01-bias", "doge-2025-08-keep-window")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exported_and_verified(name, tmp_path):
    reference = golden(name)
    verdicts = export_onnx(
        reference.save(tmp_path / "checkpoint"), tmp_path / "artifact", OnnxOptions(max_length=60, logits="all")
    )
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
    assert all(verdict.passed for verdict in export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(max_length=60)))


def classifier(name, directory):
    """The published classifier, or a new one on a published language model; its config says which."""
    checkpoint = golden(name).save(directory)
    if name == "doge-2025-01-classification":
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(
            json.dumps({**config, "architectures": ["DogeForSequenceClassification"]})
        )
        return checkpoint
    model = DogeForSequenceClassification.from_pretrained(checkpoint, num_labels=4, expert_routing=ROUTING[name])
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(checkpoint)
    return checkpoint


ROUTING = {"doge-2025-01-cdmoe": "product_keys", "doge-2025-04-cdmoe": "token", "doge-2025-08-dense": "token"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["doge-2025-01-classification", *ROUTING])
def test_a_classifier(name, tmp_path):
    checkpoint = classifier(name, tmp_path / "checkpoint")
    verdicts = export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(max_length=60, max_batch=2))
    assert len(verdicts) >= 5
    assert all(verdict.passed for verdict in verdicts)
    model, engine = DogeForSequenceClassification.from_pretrained(checkpoint).eval(), load(tmp_path / "artifact")
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, model.config.vocab_size, length).tolist() for length in (12, 1, 60, 30)]
    expected = np.concatenate([model(torch.tensor([text])).logits.numpy() for text in texts])
    np.testing.assert_allclose(engine.classify(texts), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
    if name == "doge-2025-01-classification":
        reference = golden(name)
        found = engine.classify(reference.inputs["input_ids"].numpy())
        np.testing.assert_allclose(found, reference.outputs["logits"], atol=1e-4)
