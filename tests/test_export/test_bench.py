"""What a bench compares with: baselines that cannot run, and the bytes a step must read."""

import pytest
import torch

from export.bench import baselines
from export.bench.cost import linear_layers, linear_operations, step_bytes
from export.bench.floor import linear_floor
from export.bench.measure import BaselineOptions, measure
from export.source import Source
from runtime import load
from runtime.bench import BenchOptions
from wm_models.layers.attention import DMAttention


def test_a_baseline_that_cannot_run_is_a_line_of_the_result(exported):
    _, artifact, _ = exported("hybrid")
    result = measure(artifact, BenchOptions(8, 4, rounds=1, threads=1), BaselineOptions(["transformers"]))
    assert result["baselines"] == {"transformers": {"failed": "transformers has no cheems"}}
    assert result["decode_tokens_per_second"] > 0


def test_a_baseline_that_is_not_installed_names_its_package(exported, monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(baselines.Failed, match="pip install mobius-onnx"):
        baselines.mobius_run(exported("dense")[1], 64, 1)


@pytest.mark.parametrize("name", ["dense", "biased, untied", "experts", "hybrid", "fp16", "bf16", "int8", "int4"])
def test_the_floor_has_the_linear_layers_of_the_model(exported, name):
    """Against torch's own, of which the export merges some: the operations, not the number, are the same."""
    model = Source(str(exported(name)[0])).load_model()
    linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    head = model.get_output_embeddings()
    work = sum(each.weight.numel() for each in linear)
    merged = [each for each in model.modules() if isinstance(each, DMAttention)]
    for attention in merged:  # dt over the value becomes dt over the input, for each query head
        work += attention.q_proj.in_features * model.config.num_attention_heads - attention.dt_proj.weight.numel()
    artifact = load(exported(name)[1]).artifact
    assert linear_operations(artifact, 1) == 2 * work
    assert linear_operations(artifact, 3) == 6 * work - 4 * head.weight.numel()
    quantised = [each for each in linear_layers(artifact) if each.bits]
    assert {each.bits for each in quantised} == {"int8": {8}, "int4": {4}}.get(name, set())
    assert linear_floor(artifact, 1, tokens=3, steps=1, batch=2)() > 0


@pytest.mark.parametrize("name", ["dense", "biased, untied", "experts", "hybrid", "selection", "fp16"])
def test_the_bytes_of_a_step(exported, name):
    """Against the sum over the model's parameters that a step uses, and over the rows it attends to."""
    model = Source(str(exported(name)[0])).load_model()
    config, context = model.config, 100
    width = 2 if name == "fp16" else 4
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        numbers -= model.model.embed_tokens.weight.numel()
    for layer in model.model.layers if config.is_moe else []:
        unread = config.num_experts - config.num_experts_per_tok
        numbers -= 2 * unread * layer.mlp.down_embed.weight.shape[1]
    kept = min(context, config.keep_window_size)
    states = 0
    for cache in model.new_caches(1, context):
        for field, state in cache._asdict().items():
            if field == "ssd":
                states += 2 * 4 * state.numel()
            elif field == "bias":
                states += width * state.numel()
            else:
                states += width * state.numel() * kept // context
    found = step_bytes(load(exported(name)[1]).artifact, context)
    assert found == pytest.approx(width * numbers + states, rel=0.03)  # the files have constants too, and merged dt


def test_a_baseline_is_not_taken_from_the_working_directory(exported, tmp_path, monkeypatch):
    """Its process says why it cannot run, and does not import what lies where a person happens to be."""
    for name in ("runtime", "export", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    result = measure(exported("hybrid")[1], BenchOptions(8, 4, rounds=1, threads=1), BaselineOptions(["transformers"]))
    assert result["baselines"] == {"transformers": {"failed": "transformers has no cheems"}}
