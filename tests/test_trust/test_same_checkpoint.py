"""What was opened of a checkpoint is what is loaded, exported and recorded, whoever changes the directory meanwhile."""

import hashlib
import json
import os
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import OnnxOptions, export_onnx
from export.source import Source
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST
from runtime.errors import ArtifactError
from test_trust.samples import make_checkpoint, rewrite
from test_trust.test_same_bytes import exchange
from wm_models import CheckpointError, DogeForCausalLM
from wm_models.checkpoint.files import open_checkpoint

TEXTS = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS = "model.safetensors"


@pytest.fixture(params=["transformers", "2025-08"])
def pair(request, tmp_path):
    """Two checkpoints of one shape with other weights, norms, ends and tokenizers: as transformers loads, and not."""
    first = make_checkpoint(tmp_path / "first", num_hidden_layers=1)
    for name in TEXTS[2:]:
        (first / name).write_text("{}")
    if request.param == "2025-08":
        model = DogeForCausalLM.from_pretrained(first)
        fields = {
            **json.loads((first / "config.json").read_text()),
            "num_key_value_heads": model.config.key_value_heads,
        }
        heads = fields["num_attention_heads"]
        state = {name: value for name, value in load_file(first / WEIGHTS).items() if "_norm.weight" not in name}
        bias = [name for name in state if name.endswith("self_attn.A")]
        state |= {name: state[name].repeat(heads)[:heads] for name in bias}
        state |= {
            name: state[name].repeat(heads, 1)[:heads] for name in state if name.endswith("self_attn.dt_proj.weight")
        }
        save_file(state, first / WEIGHTS, {"format": "pt"})
        (first / "config.json").write_text(json.dumps(fields))
    second = shutil.copytree(first, tmp_path / "second")
    save_file(
        {name: value * 1.5 for name, value in load_file(first / WEIGHTS).items()}, second / WEIGHTS, {"format": "pt"}
    )
    for name, field, value in (("config.json", "rms_norm_eps", 1e-3), ("generation_config.json", "temperature", 0.25)):
        changed = {**json.loads((second / name).read_text()), field: value}
        (second / name).write_text(json.dumps(changed))
    for name in TEXTS[2:]:
        (second / name).write_text('{"second": true}')
    return first, second


def model_state(model):
    """All that tells the two apart, as one value that compares."""
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
    return weights, model.config.rms_norm_eps, model.generation_config.temperature


@pytest.fixture
def swapping(pair, tmp_path):
    """The first checkpoint's path, at which the two take turns."""
    stop = threading.Event()

    def swap():
        while not stop.wait(0.005):
            exchange(*pair, tmp_path / "aside")

    thread = threading.Thread(target=swap)

    def start():
        thread.start()
        return pair[0]

    yield start
    stop.set()
    if thread.ident is not None:
        thread.join()


def test_directories_swapped_during_loads(pair, swapping):
    expected = {model_state(DogeForCausalLM.from_pretrained(path)) for path in pair}
    assert len(expected) == 2
    path, loaded = swapping(), set()
    for _ in range(40):
        try:
            loaded.add(model_state(DogeForCausalLM.from_pretrained(path)))
        except CheckpointError:  # between two renamings there is no such directory
            continue
    assert loaded == expected


def test_directories_swapped_during_exports(pair, swapping, tmp_path):
    """Weights, texts and the record of the source are of one checkpoint, and the artifact is verified by the same."""
    files = [*TEXTS[1:], "config.json", WEIGHTS]
    hashes = [{name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files} for path in pair]
    numbers = [load_file(path / WEIGHTS)["model.embed_tokens.weight"].numpy().tobytes() for path in pair]
    path, made = swapping(), []
    for attempt in range(3):
        out = tmp_path / f"artifact-{attempt}"
        try:
            assert all(verdict.passed for verdict in export_onnx(path, out, OnnxOptions(max_length=64, max_batch=1)))
        except CheckpointError:
            continue
        record = json.loads((out / "verification.json").read_text())["source"]["files"]
        which = hashes.index(record)
        for name in TEXTS[1:]:
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == hashes[which][name], name
        assert json.loads((out / "config.json").read_text())["rms_norm_eps"] == (1e-6, 1e-3)[which]
        weights = (out / "model.onnx.data").read_bytes()
        assert numbers[which] in weights
        assert numbers[1 - which] not in weights
        made.append(which)
    assert made


def test_every_file_is_opened_once(pair, monkeypatch):
    opened, inner = [], os.open

    def note(path, *args, dir_fd=None, **kwargs):
        if dir_fd is not None:
            opened.append(os.fspath(path))
        return inner(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "open", note)
    DogeForCausalLM.from_pretrained(pair[0])
    assert sorted(opened) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_file_that_is_written_to_during_a_load_is_refused(pair, name):
    """Also with the same bytes: what was read before may have been others."""
    folder = open_checkpoint(pair[0], {})
    folder.has(name)
    data = folder.read(name)
    time.sleep(0.02)
    (pair[0] / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}: was written to while it was loaded"):
        DogeForCausalLM.from_pretrained(folder)


def test_a_file_that_is_renamed_over_is_not_read(pair):
    expected = DogeForCausalLM.from_pretrained(pair[0])
    source = Source(str(pair[0]))
    found = source.load_model()
    hashes = source.hashes()
    for name in hashes:
        os.replace(pair[1] / name, pair[0] / name)
    assert source.hashes() == hashes
    again = source.load_model()
    for name, value in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(found.state_dict()[name], value), name


def test_descriptors_are_given_back(pair):
    DogeForCausalLM.from_pretrained(pair[0])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        model = DogeForCausalLM.from_pretrained(pair[0])
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert model.config.name_or_path == model.name_or_path == str(pair[0])


def test_an_artifact_is_copied_from_what_was_checked(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    (other / "model.onnx.data").write_bytes(bytes((other / "model.onnx.data").stat().st_size))
    rewrite(other)
    artifact = read_artifact(copy)
    exchange(copy, other, tmp_path / "aside")
    out = tmp_path / "out"
    out.mkdir()
    for name in artifact.files:
        artifact.copy_file(name, out / name)
    (out / MANIFEST).write_bytes(artifact.manifest)
    read_artifact(out)
    (out / "model.onnx.data").write_bytes((copy / "model.onnx.data").read_bytes())
    with pytest.raises(ArtifactError, match="SHA-256"):
        read_artifact(out)
