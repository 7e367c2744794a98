"""Checkpoints to and from transformers, and what a person is told of one that does not fit."""

import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import baseline
from safetensors.torch import load_file, save_file

from wm_models import CheckpointError, DogeForCausalLM, DogeModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    baseline().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"is_moe": True, "num_experts": 16,
                                                                         "num_experts_per_tok": 3}])  # fmt: skip
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_round_trip_with_transformers(change, shard, tmp_path, tokens):
    theirs = baseline(**change)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    mine = DogeForCausalLM.from_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine", max_shard_size=shard)
    again = transformers.DogeForCausalLM.from_pretrained(tmp_path / "mine")
    assert mine.config.expert_routing == "batch"
    assert set(again.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(mine(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-4)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
def test_bare_model_from_a_whole_checkpoint(saved, tokens):
    whole, bare = DogeForCausalLM.from_pretrained(saved), DogeModel.from_pretrained(saved)
    assert torch.equal(bare(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)


@torch.no_grad()
def test_whole_model_from_a_bare_checkpoint(saved, tmp_path, tokens):
    whole = DogeForCausalLM.from_pretrained(saved)
    whole.model.save_pretrained(tmp_path)
    again = DogeForCausalLM.from_pretrained(tmp_path)  # tied: the embedding is the head
    assert torch.equal(again(tokens).logits, whole(tokens).logits)
    with pytest.raises(CheckpointError, match=r"missing 1: lm_head\.weight"):
        DogeForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)


def test_a_tied_head_may_be_stored(copy):
    change_tensors(copy, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    model = DogeForCausalLM.from_pretrained(copy)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_a_given_config_or_state(saved, tokens):
    model = DogeForCausalLM.from_pretrained(saved)
    for config in (model.config, str(saved)):
        assert torch.equal(DogeForCausalLM.from_pretrained(saved, config=config)(tokens).logits, model(tokens).logits)
    state = DogeForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(state(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"num_hidden_layers": 4}, r"missing \d+: model\.layers\.3"),
        ({"num_hidden_layers": 2}, r"unexpected \d+: model\.layers\.2"),
        ({"intermediate_size": 95}, r"gate_proj\.weight is \[96, 64\], expected \[95, 64\]"),
    ],
)
def test_a_field_given_as_an_option_decides_the_shapes(saved, option, words):
    with pytest.raises(CheckpointError, match=words):
        DogeForCausalLM.from_pretrained(saved, **option)


def test_stray_tensors_of_a_bare_model_are_named(copy):
    change_tensors(copy, lambda state: state.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected 1: extra\.weight"):
        DogeModel.from_pretrained(copy)


def change_tensors(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def fails(directory, *words):
    with pytest.raises(CheckpointError) as caught:
        DogeForCausalLM.from_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(directory), *words):
        assert word in message


def test_no_such_directory(tmp_path):
    fails(tmp_path / "none", "no such directory")


def test_empty_directory(tmp_path):
    fails(tmp_path, "config.json", "no such file")


def test_another_model(copy):
    (copy / "config.json").write_text('{"model_type": "llama"}')
    fails(copy, "config.json", "'llama'", "not a Doge checkpoint")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_config(copy, text):
    (copy / "config.json").write_text(text)
    fails(copy, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 3),
        ("hidden_size", "wide"),
        ("hidden_act", "none"),
        ("pad_token_id", 999),
        ("rope_parameters", {"rope_type": "none", "rope_theta": 1e4}),
    ],
)
def test_config_of_wrong_values(copy, field, value):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, field: value}))
    fails(copy, "config.json")


def test_all_wrong_tensors_are_named(copy):
    def change(state):
        del state["model.norm.weight"], state["model.layers.1.self_attn.A"]
        state["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(95, 64)
        state["extra.weight"], state["other.bias"] = torch.zeros(1), torch.zeros(2)

    change_tensors(copy, change)
    fails(
        copy,
        "missing 2: model.layers.1.self_attn.A, model.norm.weight",
        "unexpected 2: extra.weight, other.bias",
        "model.layers.0.mlp.gate_proj.weight is [95, 64], expected [96, 64]",
    )


def test_odd_names_and_shapes_are_told_in_one_short_line(copy):
    def change(state):
        state["x" * 10_000], state["two\nlines"] = torch.zeros(1), torch.zeros(1)
        state["model.norm.weight"] = torch.zeros([1] * 60)

    change_tensors(copy, change)
    with pytest.raises(CheckpointError) as caught:
        DogeForCausalLM.from_pretrained(copy)
    message = str(caught.value)
    assert len(message) < 1000
    assert "\n" not in message
    assert r"'two\nlines'" in message


def test_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(copy, "model.safetensors", "truncated")


def test_no_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    fails(copy, "model.safetensors", "pytorch_model.bin", "convert it to safetensors")


def test_the_whole_file_is_read_before_an_index(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "none.safetensors"}}')
    DogeForCausalLM.from_pretrained(copy)


def test_missing_shard(tmp_path):
    baseline().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    fails(tmp_path, shard.name)


def sharded(directory):
    """A checkpoint in shards, and how to change its index."""
    baseline().save_pretrained(directory, max_shard_size="50KB")
    path = directory / "model.safetensors.index.json"

    def change(edit):
        index = json.loads(path.read_text())
        edit(index)
        path.write_text(json.dumps(index))

    return sorted(directory.glob("model-*.safetensors")), change


def unopened(monkeypatch, directory, *words):
    """It fails, before a file of weights is opened."""
    with monkeypatch.context() as patch:
        for module in ("files", "loader"):
            patch.setattr(f"wm_models.checkpoint.{module}.safe_open", lambda *_, **__: pytest.fail("it was read"))
        fails(directory, *words)


@pytest.mark.parametrize(
    "place", ["/ABSOLUTE", "../outside.safetensors", "a/../../outside.safetensors", "sub/shard", "..", ".hidden", "",
              "a\0b", "\ud800", "x" * 300, 5, None, ["outside"]]
)  # fmt: skip
def test_shards_lie_in_the_directory(tmp_path, monkeypatch, place):
    checkpoint = tmp_path / "checkpoint"
    shards, change = sharded(checkpoint)
    shutil.copy(shards[1], tmp_path / "outside.safetensors")
    if place == "/ABSOLUTE":
        place = str(tmp_path / "outside.safetensors")

    def move(index):
        for name, shard in index["weight_map"].items():
            if shard == shards[1].name:
                index["weight_map"][name] = place

    change(move)
    unopened(monkeypatch, checkpoint, "index.json", "no plain name")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "SHARD"])
@pytest.mark.parametrize("kind", ["link out", "link through", "pipe", "directory"])
def test_only_files_of_the_directory_are_read(tmp_path, monkeypatch, name, kind):
    shards, _ = sharded(tmp_path / "checkpoint")
    path = shards[1] if name == "SHARD" else tmp_path / "checkpoint" / name
    path.rename(tmp_path / "outside")
    if kind == "link out":
        path.symlink_to("../outside")
    elif kind == "link through":
        (tmp_path / "checkpoint" / "sub").symlink_to(tmp_path)
        path.symlink_to("sub/outside")
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    else:
        path.mkdir()
    unopened(monkeypatch, tmp_path / "checkpoint", path.name, "link out of" if "link" in kind else "no plain file")


def test_links_of_the_directory_itself_and_of_the_hub_are_its_own(saved, tmp_path):
    """The hub's cache is made of links: snapshots/REVISION/NAME leads to blobs/HASH."""
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "123"
    shutil.copytree(saved, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    DogeForCausalLM.from_pretrained(snapshot)
    DogeForCausalLM.from_pretrained(shutil.copytree(snapshot, tmp_path / "copy", symlinks=False))
    (snapshot / "config.json").unlink()
    (tmp_path / "elsewhere.json").write_bytes((blobs / "config.json").read_bytes())
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    fails(snapshot, "config.json", "link out of")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "weights")
    (tmp_path / "copy" / "model.safetensors").symlink_to("weights")
    DogeForCausalLM.from_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    (tmp_path / "copy" / "config.json").symlink_to("config.json")
    fails(tmp_path / "copy", "config.json", "no such file")


@torch.no_grad()
@pytest.mark.parametrize("metadata", [None, 3])
def test_an_index_needs_no_metadata(tmp_path, tokens, metadata):
    """transformers itself fails there with a KeyError."""
    expected = baseline()
    _, change = sharded(tmp_path)
    change(lambda index: index.pop("metadata") if metadata is None else index.update(metadata=metadata))
    found = DogeForCausalLM.from_pretrained(tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[]", '{"weight_map": {"a": "none.safetensors"}}', "{"])
def test_a_broken_index(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    fails(tmp_path)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(
        "wm_models.checkpoint.files.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no"))
    )
    fails("someone/doge", "no such directory", "hub")
