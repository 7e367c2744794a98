"""llama.cpp beside an artifact: the Llama that is written, and its program run on it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from export.bench import llama_cpp
from export.bench.measure import BaselineOptions, measure
from runtime.bench import BenchOptions
from wm_models import DogeConfig

INSTALLED = Path(os.environ.get("NODE_PATH", "/none"), "node-llama-cpp").is_dir()


def config(**fields):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return DogeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **fields).to_dict()


@pytest.mark.parametrize(("kind", "bits"), [("F32", 32), ("F16", 16), ("BF16", 16), ("Q8_0", 8.5), ("Q4_0", 4.5)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_llama_has_the_sizes_of_the_doge(tmp_path, kind, bits, tied):
    llama_cpp.write_llama(tmp_path / "m.gguf", config(tie_word_embeddings=tied), kind)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    assert shapes["token_embd.weight"] == (300, 64)
    assert shapes.get("output.weight") == (None if tied else (300, 64))
    assert [shapes[f"blk.1.attn_{name}.weight"] for name in ("q", "k", "v", "output")] == [
        (64, 64), (32, 64), (32, 64), (64, 64),
    ]  # fmt: skip
    assert [shapes[f"blk.1.ffn_{name}.weight"] for name in ("gate", "up", "down")] == [(96, 64), (96, 64), (64, 96)]
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    assert sum(tensor.n_bytes for tensor in matrices) * 8 == bits * sum(tensor.n_elements for tensor in matrices)
    spread = np.std([dequantize(tensor.data, tensor.tensor_type).std() / 0.02 - 1 for tensor in matrices])
    assert spread < 0.05


@pytest.mark.skipif(not INSTALLED, reason="NODE_PATH has no node-llama-cpp (npm install node-llama-cpp)")
@pytest.mark.parametrize("name", ["dense", "int8", "int4"])
def test_llama_cpp_runs_beside_the_engine(exported, name):
    options = BenchOptions(8, 4, rounds=1, threads=1)
    found = measure(exported(name)[1], options, BaselineOptions(["llama.cpp"]))["baselines"]["llama.cpp"]
    assert "failed" not in found
    rates = {rate: found[rate] for rate in found if rate.endswith("tokens_per_second")}
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("name", ["hybrid", "experts"])
def test_models_that_llama_cpp_has_not(exported, name):
    with pytest.raises(llama_cpp.Unfit, match="expected a dense Doge"):
        llama_cpp.generator(exported(name)[1], 64, 1)


def test_what_is_missing_is_named(exported, monkeypatch, tmp_path):
    artifact = exported("dense")[1]
    monkeypatch.setenv("NODE_PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(llama_cpp.Unfit, match="has no node-llama-cpp; npm install -g node-llama-cpp"):
        llama_cpp.generator(artifact, 64, 1)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(llama_cpp.Unfit, match="pip install gguf"):
        llama_cpp.generator(artifact, 64, 1)


def test_a_program_that_ends_at_once(exported, monkeypatch, tmp_path):
    """Its exit code is told; no file is left."""
    folder = tmp_path / "node-llama-cpp"
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": "node-llama-cpp", "main": "index.js"}))
    (folder / "index.js").write_text("process.exit(3)")
    monkeypatch.setenv("NODE_PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "mkdtemp", lambda: str(folder.parent / "made"))
    (tmp_path / "made").mkdir()
    with pytest.raises(llama_cpp.Unfit, match="ended with code 3"):
        llama_cpp.generator(exported("dense")[1], 64, 1)
    assert not (tmp_path / "made").exists()
