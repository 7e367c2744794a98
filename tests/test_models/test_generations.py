"""Every published generation of Doge: recognised, loaded, and equal to what its own implementation computed."""

import json
import logging

import pytest
import torch
import transformers
from conftest import DATA, assert_close, golden, rival
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from wm_models import CheckpointError, DogeConfig, DogeForCausalLM, DogeForSequenceClassification, context
from wm_models.layers.attention import keep_largest

NAMES = sorted(path.stem for path in DATA.glob("doge-*.safetensors"))
LOGITS = [name for name in NAMES if "classification" not in name]


def load(name, directory, **options):
    reference = golden(name)
    return DogeForCausalLM.from_pretrained(reference.save(directory), **options), reference


def topk_choice(bias, visible, keep):
    """The keys that the reference kept: those its top-k named, whatever its order of equals."""
    ranked = torch.where(visible, bias, torch.finfo(bias.dtype).min)
    index = ranked.topk(keep, dim=-1, sorted=False).indices
    chosen = visible & torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, index, True)
    return torch.where(chosen, bias, torch.finfo(bias.dtype).min)


@torch.no_grad()
@pytest.mark.parametrize("name", LOGITS)
def test_logits(name, tmp_path, monkeypatch):
    if "keep-window" in name:
        monkeypatch.setattr(context, "keep_largest", topk_choice)
    model, reference = load(name, tmp_path)
    mask = reference.inputs.get("attention_mask")
    found = model(reference.inputs["input_ids"], attention_mask=mask).logits
    real = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert_close(found[real], reference.outputs["logits"][real])


@torch.no_grad()
def test_keep_window_differs_among_equals_only(tmp_path, monkeypatch):
    """This project keeps the later of equal keys, the reference those that its top-k happened to name."""
    model, reference = load("doge-2025-08-keep-window", tmp_path)
    other = 0

    def compared(bias, visible, keep):
        nonlocal other
        mine, theirs = keep_largest(bias, visible, keep), topk_choice(bias, visible, keep)
        last = torch.where(theirs > torch.finfo(bias.dtype).min, bias, torch.inf).amin(-1, keepdim=True)
        assert (bias == last).expand_as(mine)[mine != theirs].all()
        other += int((mine != theirs).sum())
        return theirs

    monkeypatch.setattr(context, "keep_largest", compared)
    assert_close(model(reference.inputs["input_ids"]).logits, reference.outputs["logits"])
    assert other > 0


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LOGITS if "greedy_ids" in golden(name).outputs])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy(name, cache, tmp_path):
    model, reference = load(name, tmp_path)
    prompt, expected = reference.inputs["input_ids"], reference.outputs["greedy_ids"]
    found = model.generate(
        prompt, max_new_tokens=expected.shape[1] - prompt.shape[1], do_sample=False, eos_token_id=None,
        cache_implementation=cache,
    )  # fmt: skip
    assert torch.equal(found, expected)


@torch.no_grad()
def test_classification(tmp_path):
    reference = golden("doge-2025-01-classification")
    model = DogeForSequenceClassification.from_pretrained(reference.save(tmp_path))
    assert_close(model(reference.inputs["input_ids"]).logits, reference.outputs["logits"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_classifier_on_a_language_model(tmp_path, tied):
    """Whether its head is stored, or is the embedding."""
    checkpoint = golden("doge-2025-01-dense").save(tmp_path)
    if tied:
        DogeForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint)
        assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    model = DogeForSequenceClassification.from_pretrained(checkpoint, num_labels=4)
    ids = torch.arange(3, 15).view(2, 6)
    loss = model(ids, labels=torch.tensor([1, 3])).loss
    loss.backward()
    assert model.score.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["doge-2025-01-cdmoe", "doge-2025-04-dense", "doge-2025-08-dense"])
def test_shards(name, tmp_path):
    reference = golden(name)
    model = DogeForCausalLM.from_pretrained(reference.save(tmp_path, shard=7))
    assert_close(model(reference.inputs["input_ids"]).logits, reference.outputs["logits"])


@pytest.mark.parametrize("name", LOGITS)
def test_one_line_names_the_generation(name, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "wm_models"):
        load(name, tmp_path)
    assert [record.message for record in caplog.records] == [f"{tmp_path}: a checkpoint of generation {name[5:12]}"]


def test_transformers_is_named_too(tmp_path, caplog):
    rival().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "wm_models"):
        DogeForCausalLM.from_pretrained(tmp_path)
    assert "generation transformers" in caplog.text


def fails(directory, *words):
    with pytest.raises(CheckpointError) as caught:
        DogeForCausalLM.from_pretrained(directory)
    for word in (str(directory), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_generations(tmp_path):
    reference, other = golden("doge-2025-08-dense"), golden("doge-2025-04-dense")
    state = {name: value for name, value in reference.state.items() if ".layers.1." not in name}
    state.update({name: value for name, value in other.state.items() if ".layers.1." in name})
    reference._replace(state=state).save(tmp_path)
    fails(
        tmp_path, "nearest generation is 2025-08", "model.layers.1.input_residual",
        "unexpected 7", "model.layers.1.pre_residual.weight",
    )  # fmt: skip


def test_norms_of_one_and_bias_rows_of_another(tmp_path):
    reference = golden("doge-2025-08-dense")
    norms = {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.ones(8) for i in range(2) for n in "qk"}
    reference._replace(state={**reference.state, **norms}).save(tmp_path)
    fails(tmp_path, "nearest generation is ", "self_attn")


def test_a_missing_tensor(tmp_path):
    reference = golden("doge-2025-01-cdmoe")
    state = {k: v for k, v in reference.state.items() if k != "model.layers.1.feed_forward.keys"}
    reference._replace(state=state).save(tmp_path)
    fails(tmp_path, "nearest generation is 2025-01", "missing 1: model.layers.1.feed_forward.keys")


@torch.no_grad()
@pytest.mark.parametrize("name", [*LOGITS, "transformers"])
def test_saving_any_generation(name, tmp_path, caplog):
    """Saved, every generation loads again with the same outputs; as transformers' Doge only where that is the same."""
    if name == "transformers":
        rival().save_pretrained(tmp_path / "first")
        model = DogeForCausalLM.from_pretrained(tmp_path / "first")
    else:
        model, _ = load(name, tmp_path / "first")
    ids = torch.arange(3, 43).view(2, 20)
    model.save_pretrained(tmp_path / "second")
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    if name == "transformers":
        assert written["model_type"] == "doge"
        assert type(AutoConfig.from_pretrained(tmp_path / "second")) is transformers.DogeConfig
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
        assert type(again) is transformers.DogeForCausalLM
        assert_close(again(ids).logits, model(ids).logits)
    else:
        assert written["model_type"] == "wm_doge"
        assert "transformers' Doge has no num_bias_heads=4, query_key_norm=False" in caplog.text
        assert type(AutoConfig.from_pretrained(tmp_path / "second")) is DogeConfig
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
        assert type(again) is DogeForCausalLM
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(DogeForCausalLM.from_pretrained(tmp_path / "second")(ids).logits, model(ids).logits)


def test_without_switches_an_old_model_is_transformers(tmp_path):
    """What transformers can express is written so, whatever the spelling it was read in."""
    reference = golden("doge-2025-01-dense")
    config = DogeConfig(**{**reference.config, "num_key_value_heads": 4})
    assert config.beyond_transformers == []
    assert config.to_dict()["model_type"] == "doge"


@torch.no_grad()
@pytest.mark.parametrize("routing", ["token", "product_keys"])
def test_an_mlp_is_inherited(routing, tmp_path):
    """An MLP checkpoint becomes a mixture with the same outputs, whose experts then learn."""
    model, reference = load("doge-2025-08-dense", tmp_path)
    experts = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 8, "expert_routing": routing}
    mixture = DogeForCausalLM.from_pretrained(tmp_path, **experts)
    ids = reference.inputs["input_ids"]
    assert torch.equal(mixture(ids).logits, model(ids).logits)
    optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
    with torch.enable_grad():
        for _ in range(2):
            mixture.zero_grad()
            mixture(ids, labels=ids).loss.backward()
            optimizer.step()
    mlp = mixture.model.layers[0].mlp
    router = mlp.router_gate.weight if routing == "token" else mlp.keys
    for parameter in (mlp.up_embed.weight, mlp.down_embed.weight, router):
        assert parameter.grad.abs().max() > 0


def test_experts_are_inherited_whole_or_not_at_all(tmp_path):
    """A checkpoint that says it has experts must have them."""
    reference = golden("doge-2025-04-cdmoe")
    state = {k: v for k, v in reference.state.items() if "up_embed" not in k}
    reference._replace(state=state).save(tmp_path)
    fails(tmp_path, "missing 2: ", "feed_forward.up_embed.weight")


def test_stray_tensor_in_an_old_checkpoint(tmp_path):
    reference = golden("doge-2025-04-dense")
    reference.save(tmp_path)
    save_file({**reference.state, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    fails(tmp_path, "unexpected 1: extra")
