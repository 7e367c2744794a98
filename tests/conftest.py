"""Models that many tests share: small, and with nothing left at its initial value."""

import copy
import fcntl
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.onnx._internal.exporter._registration import ONNXRegistry

import wm_models
from wm_models import DogeForCausalLM, DogeForSequenceClassification

# Garbage collections take a tenth of an export's time: a trace makes millions of objects, and most live until its end.
# What is imported is left out of them, and they come less often.
gc.freeze()
gc.set_threshold(20_000, 20, 50)

SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, A, norms and residuals included, a value that shows when it is misplaced."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif "norm" in name or "residual" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise)


def baseline(**changes: object) -> transformers.DogeForCausalLM | transformers.DogeForSequenceClassification:
    """transformers' own Doge, small and randomised; a classifier where `num_labels` or `id2label` says so."""
    classifies = {"num_labels", "id2label"} & changes.keys()
    kind = transformers.DogeForSequenceClassification if classifies else transformers.DogeForCausalLM
    model = kind(transformers.DogeConfig(**{**SMALL, **changes})).eval()
    randomise(model)
    return model


def ours(model: transformers.PreTrainedModel, **config: object) -> DogeForCausalLM | DogeForSequenceClassification:
    """This project's Doge with the same weights."""
    fields = {"expert_routing": "batch", **model.config.to_dict(), **config}
    copy = getattr(wm_models, type(model).__name__)(wm_models.DogeConfig(**fields)).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture(autouse=True)
def process_as_found() -> Iterator[None]:
    """No test leaves denormals off in the caller's thread, a logger disabled, or the compiler strict."""
    yield
    assert sys.float_info.min / 2 > 0, "denormals are taken for zero in this thread"
    disabled = [name for name in ("wm_models", "export", "runtime") if logging.getLogger(name).disabled]
    assert not disabled, f"loggers are disabled: {disabled}"
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    assert dynamo is None or not dynamo.error_on_recompile, "torch._dynamo.config.error_on_recompile is set"


@pytest.fixture(scope="session", autouse=True)
def translations_read_once() -> Iterator[None]:
    """torch.onnx reads the sources of all its translations again at each export: a second, for what never changes."""
    read = cache(ONNXRegistry.from_torchlib)

    def known(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(read(opset_version))
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(known))
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: the directory of that name, which `make` fills where no worker of this run has done so yet.

    What is in it is read only: other workers read it too.
    """
    workers = tmp_path_factory.getbasetemp()
    root = (workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers) / "once"
    root.mkdir(exist_ok=True)

    def directory(name: str, make: Callable[[Path], object]) -> Path:
        path = root / name
        with (root / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                path.mkdir(exist_ok=True)
                make(path)
                lock.write("made")
        return path

    return directory


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """(3, 100) ids, no two equal in a row: equal tokens have equal biases, and ties may be broken either way."""
    draw = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(SMALL["vocab_size"], generator=draw)[:100] for _ in range(3)])


DATA = Path(__file__).parent / "data"


class Golden(NamedTuple):
    """A public implementation's checkpoint, and what it computed: see tests/data/README.md."""

    name: str
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def save(self, directory: Path, shard: int = 0) -> Path:
        """Write it as that implementation did: one file, or shards of `shard` tensors with an index."""
        directory.mkdir(parents=True, exist_ok=True)
        model_type = self.name.split("-")[0]
        (directory / "config.json").write_text(json.dumps({"model_type": model_type, **self.config}))
        if not shard:
            save_file(self.state, directory / "model.safetensors", metadata={"format": "pt"})
            return directory
        names, weight_map = sorted(self.state), {}
        for start in range(0, len(names), shard):
            part = {name: self.state[name] for name in names[start : start + shard]}
            file = f"model-{start:05}.safetensors"
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory


def golden(name: str) -> Golden:
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        parts: dict[str, dict[str, torch.Tensor]] = {"state": {}, "input": {}, "output": {}}
        for key in file.keys():  # noqa: SIM118
            part, rest = key.split(".", 1)
            parts[part][rest] = file.get_tensor(key)
        return Golden(name, json.loads(file.metadata()["config"]), parts["state"], parts["input"], parts["output"])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the larger of one and the largest value."""
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= limit
