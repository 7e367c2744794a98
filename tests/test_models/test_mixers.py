"""A sequence mixer that is registered from outside goes all the way: training, steps, export, verification, runtime."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, randomise
from test_models.moving_average import MovingAverage
from transformers import DynamicCache

from runtime import load
from wm_models import CheemsConfig, CheemsForCausalLM

TESTS = Path(__file__).parents[1]
HYBRID = {**SMALL, "attn_layer_period": 3, "attn_layer_offset": 1, "sequence_mixer": "average"}


@pytest.fixture(scope="module")
def model():
    model = CheemsForCausalLM(CheemsConfig(**HYBRID, eos_token_id=None)).eval()
    randomise(model)
    return model


def test_its_name_and_its_own_start_values():
    model = CheemsForCausalLM(CheemsConfig(**HYBRID))
    names = {name for name, _ in model.named_parameters() if ".layers.0." in name}
    assert "model.layers.0.average.decay" in names
    assert not any("ssd" in name for name in names)
    torch.testing.assert_close(model.model.layers[2].average.decay, torch.linspace(0, 4, SMALL["hidden_size"]))


@torch.no_grad()
def test_steps_are_the_full_pass(model, tokens):
    """Ragged chunks and an idle slot over static caches, and transformers' cache."""
    full = model(tokens).logits
    caches, held = model.new_caches(3, 100), torch.zeros(3, dtype=torch.long)
    for cache in caches:
        for part in cache:
            part.fill_(7)  # what a slot held before does not matter
    for new in ([40, 9, 1], [1, 0, 1], [3, 7, 20], *[[1, 1, 1]] * 4):
        new = torch.tensor(new)
        ids = torch.zeros(3, int(new.max()), dtype=torch.long)
        for slot in range(3):
            ids[slot, : new[slot]] = tokens[slot, held[slot] : held[slot] + new[slot]]
        logits, caches = model.step(ids, held, new, caches)
        held = held + new
        for slot in new.nonzero()[:, 0]:
            torch.testing.assert_close(logits[slot, 0], full[slot, held[slot] - 1], rtol=0, atol=1e-4)
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, a:b], cache=cache, use_cache=True).logits for a, b in ((0, 60), (60, 61), (61, 100))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-4)


@torch.no_grad()
def test_exported_verified_and_run(model, tokens, tmp_path):
    """By the command, in a process that has imported the mixer; the runtime knows nothing of it."""
    model.save_pretrained(tmp_path / "checkpoint")
    program = "import test_models.moving_average; from export.cli import main; main()"
    command = ["onnx", tmp_path / "checkpoint", "--out", tmp_path / "artifact", "--max-length", "120"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", program, *command], check=True, timeout=300, env=environment)
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["verified"] is True
    states = {state["input"]: state["shape"] for state in manifest["graph"]["states"]}
    assert states["layers.0.average"] == states["layers.2.average"] == ["batch", SMALL["hidden_size"]]
    assert states["layers.1.key"] == ["batch", 2, "capacity", 16]
    prompt = tokens[:1, :20]
    expected = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    assert load(tmp_path / "artifact").generate_ids(prompt[0].tolist(), 40) == expected


def test_an_unknown_mixer_is_named():
    with pytest.raises(ValueError, match="sequence_mixer is 'mamba'; expected one of ssd, average"):
        CheemsConfig(**{**HYBRID, "sequence_mixer": "mamba"})


def test_gradients_reach_it(model, tokens):
    model(tokens, labels=tokens).loss.backward()
    layer = model.model.layers[0].average
    assert isinstance(layer, MovingAverage)
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())
