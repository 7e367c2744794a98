"""Checkpoints of Doge2 (small-doge), whose attention is transformers' Doge's with a bias for each query head."""

import json
import logging

import pytest
import torch
from conftest import assert_close, baseline, randomise
from transformers.models.doge import modeling_doge

from export import OnnxOptions, export_onnx
from runtime import load
from wm_models import CheckpointError, DogeForCausalLM

EXPERTS = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}


@pytest.fixture
def reference(monkeypatch):
    """transformers' Doge, changed where Doge2 differs: A and dt_proj have a row for each query head."""
    repeat = modeling_doge.repeat_kv

    def repeat_what_is_narrow(states, times):
        return states if states.shape[1] == 4 else repeat(states, times)

    monkeypatch.setattr(modeling_doge, "repeat_kv", repeat_what_is_narrow)

    def build(directory, **changes):
        model = baseline(attn_implementation="sdpa", **changes)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.A = torch.nn.Parameter(torch.zeros(4))
            attention.dt_proj = torch.nn.Linear(attention.dt_proj.in_features, 4, bias=False)
        randomise(model)
        model.save_pretrained(directory)
        return model

    return build


def rewrite(directory, **fields):
    """Make config.json Doge2's."""
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), "model_type": "doge2", "dynamic_mask_ratio": 0.0, **fields}
    path.write_text(json.dumps(values))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_logits_and_greedy_ids(changes, reference, tokens, tmp_path, caplog):
    model = reference(tmp_path, **changes)
    rewrite(tmp_path)
    with caplog.at_level(logging.INFO, "wm_models"):
        found = DogeForCausalLM.from_pretrained(tmp_path)
    assert "a checkpoint of format doge2" in caplog.text
    assert_close(found(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(found.generate(tokens[:, :20], **options), model.generate(tokens[:, :20], **options))


@torch.no_grad()
def test_it_is_exported(reference, tokens, tmp_path):
    model = reference(tmp_path / "checkpoint")
    rewrite(tmp_path / "checkpoint")
    options = OnnxOptions(max_length=60)
    found = export_onnx(tmp_path / "checkpoint", tmp_path / "artifact", options)
    assert all(comparison.passed for comparison in found)
    prompt = tokens[0, :20].tolist()
    expected = model.generate(tokens[:1, :20], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:]
    assert load(tmp_path / "artifact").generate_ids(prompt, 12) == expected.tolist()


def test_no_key_is_dropped_up_to_the_keep_window(reference, tokens, tmp_path):
    model = reference(tmp_path)
    rewrite(tmp_path, dynamic_mask_ratio=0.5, keep_window_size=512)
    with torch.no_grad():
        assert_close(DogeForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    rewrite(tmp_path, dynamic_mask_ratio=0.5, keep_window_size=100)
    with pytest.raises(CheckpointError, match=r"dynamic_mask_ratio is 0\.5 over 512 .*: set max_position_embeddings"):
        DogeForCausalLM.from_pretrained(tmp_path)
