"""Checkpoints and artifacts that many tests share: each export is made once."""

import os
import pickle
import signal
import subprocess
import sys
import time
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
from conftest import SMALL, baseline, ours, randomise

from export import OnnxOptions, export_onnx
from export.lower import cache_window, lower
from export.package.graph_files import CPU_GRAPH, GRAPH, save_graph
from export.package.manifest import capacities, describe, label_count, parameter_count, write_manifest
from export.quantization.schemes import SCHEMES
from export.quantization.weights import quantize_graph
from export.targets.onnx_artifact import DTYPES, SPARE
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import Artifact, Graph
from wm_models import CheemsConfig, CheemsForCausalLM, shipped_tokenizer

HYBRID = {"attn_layer_period": 3, "attn_layer_offset": 1, "ssd_chunk_size": 16}
PAIR = {**HYBRID, "attn_layer_period": 2, "num_hidden_layers": 2}  # one layer of each kind
VARIANTS = {
    "dense": ({}, {}),
    "biased, untied": ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, {}),
    "selection": ({"keep_window_size": 40}, {"max_length": 256}),
    "window": ({"keep_window_size": 24}, {"spare": 16}),
    "sliding window": ({"sliding_window": 20}, {}),
    "experts": ({"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5}, {}),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                      "max_position_embeddings": 128}, {}),
    "fp16": ({}, {"dtype": "fp16"}),
    "bf16": ({}, {"dtype": "bf16"}),
    "int8": ({}, {"quantize": "int8"}),
    "int4": ({"logit_scale": 0.25}, {"quantize": "int4"}),
    "int4 experts": ({"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5, "logit_scale": 0.25},
                     {"quantize": "int4", "max_length": 256}),
    "int8 cache": ({"keep_window_size": 24, "logit_scale": 0.5}, {"spare": 16, "kv_cache_dtype": "int8"}),
    "int8 cache, hybrid": ({**PAIR, "logit_scale": 0.5},
                           {"kv_cache_dtype": "int8", "dtype": "fp16", "max_length": 80}),
    "int8 cache, int4 experts": ({"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5, "logit_scale": 0.25},
                                 {"quantize": "int4", "max_length": 80, "kv_cache_dtype": "int8"}),
    "all logits": ({}, {"logits": "all", "max_batch": 2}),
    "hybrid": (HYBRID, {}),
    "hybrid experts": ({**PAIR, "is_moe": True, "num_experts": 64, "num_experts_per_tok": 5}, {}),
    "hybrid bf16": (HYBRID, {"dtype": "bf16"}),
    "classifier": ({"num_labels": 3, "pad_token_id": 2}, {}),
    "classifier, one label": ({"num_labels": 1}, {"dtype": "fp16", "max_length": 80}),
    "classifier bf16": ({"num_labels": 3}, {"dtype": "bf16", "max_length": 80}),
    "classifier int8": ({"num_labels": 40}, {"quantize": "int8", "max_length": 80}),
    "classifier int4": ({"num_labels": 3, "logit_scale": 0.25}, {"quantize": "int4", "max_length": 80}),
    "one slot": ({}, {"max_batch": 1, "max_length": 300}),
}  # fmt: skip


def save_checkpoint(directory: Path, tokenizer: bool = False, logit_scale: float = 1.0, **changes: object) -> Path:
    """A randomised checkpoint of per-token routing; four bits blur random logits unless they are small."""
    if "attn_layer_period" in changes:
        model = CheemsForCausalLM(CheemsConfig(**{**SMALL, **changes}))
        randomise(model)
    else:
        model = ours(baseline(**changes), expert_routing="token")
    model.model.norm.weight.data *= logit_scale
    model.save_pretrained(directory)
    if tokenizer:
        shipped_tokenizer().save_pretrained(directory)
    return directory


def lowered(
    directory: Path,
    model,
    dtype: str = "fp32",
    max_batch: int = 4,
    max_length: int = 64,
    spare: int = SPARE,
    scheme: str = "none",
) -> Artifact:
    """An artifact of `model`, which is used up, without its comparison with the eager model: for what comes after.

    `scheme` names a quantisation that needs no calibration, of a model in float32.
    """
    directory.mkdir(parents=True)
    config, parameters, labels = model.config.to_dict(), parameter_count(model), label_count(model)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    window = cache_window(model.config, max_length, spare)
    bounds = {"max_batch": max_batch, "max_length": max_length, "window": window}
    graph = lower(model.to(dtype=DTYPES[dtype]), all_logits=False, **bounds)
    save_graph(graph, directory, name)
    if scheme != "none":
        graph = quantize_graph(directory / GRAPH, SCHEMES[scheme], SCHEMES[scheme].block, {})
        save_graph(graph, directory, name, scheme)
    portable = dtype != "bf16" and scheme == "none"
    contract = Graph(
        file=GRAPH, cpu_file=GRAPH if portable else CPU_GRAPH, dtype=name, quantization=scheme,
        logits="last", indexed=True, vocabulary=config["vocab_size"], capacities=tuple(capacities(max_length)),
        states=(), labels=labels, **bounds,
    )  # fmt: skip
    write_manifest(directory, describe(graph, config, parameters, contract), verified=True)
    return read_artifact(directory)


@pytest.fixture(scope="session")
def exported(once):
    """`exported(name)`: the checkpoint, the artifact and the verdicts of a variant."""

    def make(name, root):
        changes, options = VARIANTS[name]
        checkpoint = save_checkpoint(root / "checkpoint", **changes)
        verdicts = export_onnx(checkpoint, root / "artifact", OnnxOptions(**options))
        (root / "verdicts").write_bytes(pickle.dumps(verdicts))

    @cache
    def export(name):
        root = once(name, partial(make, name))
        return root / "checkpoint", root / "artifact", pickle.loads((root / "verdicts").read_bytes())

    return export


@pytest.fixture
def typed(monkeypatch, capfd):
    """`typed(module, *arguments)`: what its command line prints in this process, and the exit code."""

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            import_module(f"{module}.cli").main()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capfd.readouterr())

    return run


def interrupted(arguments: list[str], root: Path, begun: str) -> tuple[int, bytes]:
    """wm-export, sent Ctrl-C once something in `root` matches `begun`: its exit code, and what it said on stderr.

    It heeds the signal even where the tests themselves run in the background, and so ignore it.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", "from export.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(1200):
        if list(root.glob(begun)):
            break
        time.sleep(0.05)
    assert list(root.iterdir())
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors
