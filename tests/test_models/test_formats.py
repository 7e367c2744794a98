"""Every published format of Doge: recognised, loaded, and equal to what its own implementation computed."""

import json
import logging

import pytest
import torch
import transformers
from conftest import DATA, assert_close, baseline, golden, randomise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from export import OnnxOptions, export_onnx
from runtime import load as load_artifact
from wm_models import (
    FORMATS,
    CheckpointError,
    DogeConfig,
    DogeForCausalLM,
    DogeForSequenceClassification,
    Format,
    context,
)
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


def causal_mask(ids):
    """A mask of all keys, (B, 1, S, S): with one the model selects keys by `keep_largest`, which tests can replace."""
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(ids.shape[0], 1, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("name", LOGITS)
def test_logits(name, tmp_path, monkeypatch):
    model, reference = load(name, tmp_path)
    mask, given = reference.inputs.get("attention_mask"), reference.inputs.get("attention_mask")
    if "keep-window" in name:
        monkeypatch.setattr(context, "keep_largest", topk_choice)
        given = causal_mask(reference.inputs["input_ids"])
    found = model(reference.inputs["input_ids"], attention_mask=given).logits
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
    ids = reference.inputs["input_ids"]
    assert_close(model(ids, attention_mask=causal_mask(ids)).logits, reference.outputs["logits"])
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
def test_one_line_names_the_format(name, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "wm_models"):
        load(name, tmp_path)
    told = [record.message for record in caplog.records if " a checkpoint of format " in record.message]
    assert told == [f"{tmp_path}: a checkpoint of format {name[5:12]}"]


def test_transformers_is_named_too(tmp_path, caplog):
    baseline().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "wm_models"):
        DogeForCausalLM.from_pretrained(tmp_path)
    assert "format transformers" in caplog.text


def fails(directory, *words):
    with pytest.raises(CheckpointError) as caught:
        DogeForCausalLM.from_pretrained(directory)
    for word in (str(directory), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_formats(tmp_path):
    reference, other = golden("doge-2025-08-dense"), golden("doge-2025-04-dense")
    state = {name: value for name, value in reference.state.items() if ".layers.1." not in name}
    state.update({name: value for name, value in other.state.items() if ".layers.1." in name})
    reference._replace(state=state).save(tmp_path)
    fails(
        tmp_path, "nearest format is 2025-08", "model.layers.1.input_residual",
        "unexpected 7", "model.layers.1.pre_residual.weight",
    )  # fmt: skip


def test_norms_of_one_and_bias_rows_of_another(tmp_path):
    reference = golden("doge-2025-08-dense")
    norms = {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.ones(8) for i in range(2) for n in "qk"}
    reference._replace(state={**reference.state, **norms}).save(tmp_path)
    fails(tmp_path, "nearest format is ", "self_attn")


def test_a_missing_tensor(tmp_path):
    reference = golden("doge-2025-01-cdmoe")
    state = {k: v for k, v in reference.state.items() if k != "model.layers.1.feed_forward.keys"}
    reference._replace(state=state).save(tmp_path)
    fails(tmp_path, "nearest format is 2025-01", "missing 1: model.layers.1.feed_forward.keys")


def assert_same(found, expected, ids):
    """The same weights to the bit, in memory of one alignment: kernels round by where a tensor begins."""
    assert found.state_dict().keys() == expected.state_dict().keys()
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
        one.data, other.data = one.data.clone(), other.data.clone()
    assert torch.equal(found(ids).logits, expected(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", [*LOGITS, "transformers"])
def test_saving_any_format(name, tmp_path, caplog):
    """Saved, every format loads again with the same outputs; as transformers' Doge only where that is the same."""
    if name == "transformers":
        baseline().save_pretrained(tmp_path / "first")
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
        assert_same(again, model, ids)
    assert_same(DogeForCausalLM.from_pretrained(tmp_path / "second"), model, ids)


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


@pytest.fixture
def other_format():
    """A format of nobody: other names for the layers' parts, A stored with the other sign, and one field renamed."""

    def fields(values):
        return {**{k: v for k, v in values.items() if k != "width"}, "hidden_size": values["width"]}

    def convert(state, values):
        for name in state:
            if name.endswith(".A"):
                state[name] = -state[name]

    names = {"self_attn": "mix", "mlp": "feed", "embed_tokens": "table"}
    added = Format("elsewhere", "doge-elsewhere", DogeConfig, names, fields, convert)
    FORMATS.append(added)
    yield added
    FORMATS.remove(added)


@torch.no_grad()
def test_a_format_from_outside(other_format, tmp_path, caplog):
    """One entry, and its checkpoints load, are exported, verified and run."""
    model = DogeForCausalLM(
        DogeConfig.from_dict({**baseline().config.to_dict(), "expert_routing": "token", "eos_token_id": None})
    )
    model.eval()
    randomise(model)
    state = {
        other_format.stored_name(name): (-value if name.endswith(".A") else value).clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    values = {k: v for k, v in model.config.to_dict().items() if k != "hidden_size"}
    values |= {"model_type": other_format.model_type, "width": model.config.hidden_size}
    (checkpoint := tmp_path / "checkpoint").mkdir()
    (checkpoint / "config.json").write_text(json.dumps(values))
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(3, 43).view(2, 20)
    with caplog.at_level(logging.INFO, "wm_models"):
        assert torch.equal(DogeForCausalLM.from_pretrained(checkpoint)(ids).logits, model(ids).logits)
    assert "a checkpoint of format elsewhere" in caplog.text
    assert all(verdict.passed for verdict in export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(max_length=60)))
    expected = model.generate(ids[:1], max_new_tokens=20, do_sample=False)[0, 20:].tolist()
    assert load_artifact(tmp_path / "artifact").generate_ids(ids[0].tolist(), 20) == expected
