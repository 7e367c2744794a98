"""Engines built for real, by TensorRT-RTX on a machine without a GPU; what refuses, and what is left behind."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import SMALL, baseline, ours, randomise
from test_runtime.standin import Driver

from export import ExportError, TensorRTOptions, build_tensorrt
from export.inspection import inspect_artifact
from export.targets import tensorrt as engines
from export.targets import tensorrt_builder
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import EVICTED, INPUTS, LOGITS_INDEX, NEXT_IDS
from runtime.backends.eviction import joined
from runtime.errors import ArtifactError
from test_export.conftest import PAIR, interrupted, lowered, save_checkpoint
from wm_models import DogeConfig, DogeForCausalLM, create
from wm_models.cheems import CheemsForCausalLM
from wm_models.configuration import CheemsConfig

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {
    "dense": {},
    "experts by gate": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5},
    "selection": {"keep_window_size": 24},
    "window": {"keep_window_size": 24},
    "2025-01": {
        "rope_parameters": DYNAMIC, "max_position_embeddings": 16, "query_key_norm": False, "num_bias_heads": 4,
        "dynamic_mask_ratio": 0.25, "is_moe": True, "num_experts": 64, "num_experts_per_tok": 6,
        "expert_routing": "product_keys", "num_expert_heads": 2, "expert_retrieval_size": 16,
    },
}  # fmt: skip
DTYPES = ("fp32", "fp16", "bf16")


def small(**changes):
    """Two layers, every parameter with a value that shows."""
    fields = {**SMALL, "num_hidden_layers": 2, **changes}
    model = DogeForCausalLM(DogeConfig(**fields)).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family, dtype)`: an artifact whose only fault is that nobody compared it; lowered once."""
    artifacts = {}

    def make(family, dtype):
        if (family, dtype) not in artifacts:
            directory = tmp_path_factory.mktemp("lowered") / "artifact"
            spare = {"spare": 16} if family == "window" else {}
            artifacts[family, dtype] = lowered(directory, small(**FAMILIES[family]), dtype, **spare)
        return artifacts[family, dtype]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_becomes_its_layer(made, tmp_path, family, dtype):
    artifact = made(family, dtype)
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    nodes = Counter(node.op_type for node in ir.load(artifact.path / artifact.graph.file).graph)
    layers = engine["layers"]
    assert len(layers["cache_updates"]) == nodes["TensorScatter"] == 6
    assert len(layers["attention"]) == nodes["Attention"] == 2
    assert len(layers["rotary"]) == nodes["RotaryEmbedding"] >= 2
    assert [cache["output"] for cache in layers["cache_updates"]] == engine["aliased"]
    assert all(cache["output"] == f"{cache['input']}.out" for cache in layers["cache_updates"])
    assert [attention["module"] for attention in layers["attention"]] == [
        f"model.layers.{layer}.self_attn" for layer in range(2)
    ]
    # float32 has a kernel for one token only
    assert all(attention["fused"] == [True, dtype != "fp32"] for attention in layers["attention"])
    checked = read_artifact(tmp_path / "out")
    assert {engine["file"], engine["log"]} < checked.files.keys()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["engines"] == [engine]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_weights_stay_quantised(exported, tmp_path, name):
    """The builder takes every DequantizeLinear as a layer of its own, over the codes, named with its module."""
    artifact = read_artifact(exported(name)[1])
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx", max_length=64))
    nodes = Counter(node.op_type for node in ir.load(artifact.path / artifact.graph.file).graph)
    assert engine["layers"]["counts"]["DEQUANTIZE"] == nodes["DequantizeLinear"] > 10
    quantised = engine["layers"]["quantised"]
    assert len(quantised) == nodes["DequantizeLinear"]
    assert {weight["type"] for weight in quantised} == {name.upper()}
    found = {(weight["module"], weight["name"]) for weight in quantised}
    assert ("model.layers.0.mlp.gate_proj", "layers.0.mlp.gate_proj.matmul.dequantize") in found
    assert ("lm_head", "lm_head.dequantize") in found
    rows = next(rows for title, _, rows in inspect_artifact(tmp_path / "out").tables if title.startswith("Quantised"))
    assert [row[:2] for row in rows] == [[weight["module"], weight["name"]] for weight in quantised]
    assert len(engine["layers"]["cache_updates"]) == nodes["TensorScatter"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rewritten_graph_computes_the_same(made, tmp_path, family, dtype):
    """In ONNX Runtime, whose kernels are nobody's here: a ragged chunk, then a token."""
    artifact = made(family, dtype)
    capacity = artifact.graph.rows(48)
    model = ir.load(artifact.path / artifact.graph.file)
    narrowed = any(value.dtype == ir.DataType.DOUBLE for value in model.graph.initializers.values())
    engines.prepare_for_tensorrt(model, artifact.graph, 48)
    rewritten = artifact.path / "rewritten.onnx"
    rewritten.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    sessions = [onnxruntime.InferenceSession(path) for path in (artifact.path / artifact.graph.file, rewritten)]
    rewritten.unlink()
    names = [output.name for output in sessions[0].get_outputs()]
    biases = {state.output for state in artifact.graph.states if state.input.endswith(".bias")}
    draw = np.random.default_rng(0)
    kind = np.float32 if dtype == "fp32" else np.float16
    # where keys are selected, biases are in float64, which TensorRT has not
    rounding = {name: 2e-5 if narrowed and (dtype == "fp32" or name in biases) else 0.0 for name in names}
    held = [{s.input: np.zeros(s.sized(3, capacity), kind) for s in artifact.graph.states} for _ in sessions]
    for lengths, new in (([0, 0, 0], [30, 4, 17]), ([30, 4, 17], [1, 0, 1])):
        ids = draw.integers(0, 211, (3, max(new)))
        step = dict(zip(INPUTS, (ids, np.array(lengths), np.array(new)), strict=True))
        step |= {name: np.array([9, 0, 30]) for name in artifact.graph.inputs if name == EVICTED}
        last = np.maximum(np.array(new) - 1, 0)[:, None]  # which an engine chooses itself
        portable = sessions[0].run(names, {**step, LOGITS_INDEX: last, **held[0]})
        fit = sessions[1].run([*names, NEXT_IDS], {**step, **held[1]})
        for name, expected, found in zip(names, portable, fit, strict=False):
            if name in biases:  # whose digits differ where their sum is rounded otherwise
                expected, found = joined(expected, dtype), joined(found, dtype)
            np.testing.assert_allclose(found, expected, rtol=0, atol=rounding[name], err_msg=name)
        np.testing.assert_array_equal(fit[-1], portable[0].argmax(-1))
        held = [
            {n.removesuffix(".out"): v for n, v in zip(names[1:], r[1 : len(names)], strict=True)}
            for r in (portable, fit)
        ]


def test_next_ids_say_when_logits_are_broken(made, tmp_path):
    artifact = made("dense", "fp32")
    model = ir.load(artifact.path / artifact.graph.file)
    engines.prepare_for_tensorrt(model, artifact.graph, 16)
    path = artifact.path / "rewritten.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    session = onnxruntime.InferenceSession(path)
    path.unlink()
    feed = {state.input: np.zeros(state.sized(2, 16), np.float32) for state in artifact.graph.states}
    feed |= dict(zip(INPUTS, (np.ones((2, 1), np.int64), np.array([1, 1]), np.array([1, 1])), strict=True))
    feed["layers.0.value"][0, 0, 0, 0] = np.nan
    ids = session.run([NEXT_IDS], feed)[0]
    assert ids[0, 0] == -1
    assert ids[1, 0] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_cheems(tmp_path, dtype):
    """Its attention's caches are in place; an SSD state is written elsewhere, and the session copies it back."""
    model = CheemsForCausalLM(CheemsConfig(**{**SMALL, **PAIR})).eval()
    randomise(model)
    artifact = lowered(tmp_path / "cheems", model, dtype)
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    assert engine["aliased"] == [f"layers.1.{name}.out" for name in ("key", "value", "bias")]
    assert [attention["fused"] for attention in engine["layers"]["attention"]] == [[True, dtype != "fp32"]]


@pytest.mark.slow
def test_a_classifier(tmp_path):
    artifact = lowered(tmp_path / "classifier", ours(baseline(num_hidden_layers=1, num_labels=3)), "fp16")
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    assert [attention["fused"] for attention in engine["layers"]["attention"]] == [[True, True]]
    assert len(engine["layers"]["cache_updates"]) == 3
    assert read_artifact(tmp_path / "out").graph.labels == 3


@pytest.mark.slow
def test_the_smallest_preset(tmp_path):
    """Two heads: there is no fused kernel for exactly one token, but one for a profile of one or two."""
    artifact = lowered(tmp_path / "20m", create("doge-20m"), "bf16", max_batch=8, max_length=512)
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx", chunk=64))
    assert [profile["sequence"] for profile in engine["profiles"]] == [[1, 1, 2], [2, 64, 64]]
    assert all(attention["fused"] == [True, True] for attention in engine["layers"]["attention"])
    assert len(engine["layers"]["cache_updates"]) == 24


def test_a_tied_table_is_there_once(tmp_path):
    """The kernels take some megabytes whatever the model, so the table is made large."""
    artifact = lowered(tmp_path / "wide", small(vocab_size=200_000, num_hidden_layers=1), "fp16")
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    table = 200_000 * 64 * 2
    assert engine["build"]["bytes"] < (artifact.path / "model.onnx.data").stat().st_size + table / 2


def test_targets_and_bounds(made, tmp_path):
    artifact = made("dense", "fp32")
    options = {"compute_capability": "8.6,12.0", "max_batch": 2, "max_length": 40, "chunk": 16}
    engine = build_tensorrt(artifact.path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx", **options))
    assert engine["compute_capabilities"] == ["8.6", "12.0"]
    assert (engine["capacity"], engine["max_batch"]) == (40, 2)
    assert [profile["batch"][2] for profile in engine["profiles"]] == [2, 2]
    assert engine["profiles"][1]["sequence"] == [2, 16, 16]
    titles = [title for title, _, _ in inspect_artifact(tmp_path / "out").tables]
    assert "model.tensorrt-rtx.engine: tensorrt-rtx 1." in "\n".join(titles)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"builder": "cuda"}, "--builder is 'cuda'.*tensorrt-rtx"),
        ({"compute_capability": "9.0"}, r"9\.0: tensorrt-rtx .* builds for 7\.5, 8\.0.*with --builder tensorrt$"),
        ({"max_batch": 5}, "--max-batch is 5.*1 to 4"),
        ({"max_length": 65}, "--max-length is 65.*1 to 64"),
        ({"chunk": 1}, "--chunk is 1"),
        ({"dtype": "fp16"}, "--dtype is fp16.*is float32"),
    ],
)
def test_option_errors(made, tmp_path, options, words):
    with pytest.raises(ExportError, match=words):
        build_tensorrt(
            made("dense", "fp32").path, tmp_path / "out", TensorRTOptions(**{"builder": "tensorrt-rtx", **options})
        )
    assert not list(tmp_path.iterdir())


def test_tensorrt_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda builder: False)
    with pytest.raises(ExportError, match=r"tensorrt-rtx is not installed.*pip install 'wm-models\[tensorrt-rtx\]'"):
        engines.choose_builder("auto")
    monkeypatch.setattr(engines, "installed", lambda builder: True)
    monkeypatch.setattr(engines, "gpu_count", lambda: 0)
    assert engines.choose_builder("auto") == "tensorrt-rtx"
    with pytest.raises(ExportError, match="tensorrt needs a GPU"):
        engines.choose_builder("tensorrt")
    monkeypatch.setattr(engines, "gpu_count", lambda: 1)
    assert engines.choose_builder("auto") == "tensorrt"


@pytest.mark.parametrize(
    ("capability", "has_code"), [((8, 9), True), ((9, 0), False), ((10, 0), False), ((13, 0), True)]
)
def test_auto_never_builds_what_this_gpu_cannot_run(monkeypatch, capability, has_code):
    """Where tensorrt-rtx alone is installed; it has no code for an H100, and makes that for later GPUs itself."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Driver(capability=capability))
    monkeypatch.setattr(engines, "installed", lambda builder: builder == "tensorrt-rtx")
    assert engines.choose_builder("tensorrt-rtx") == engines.choose_builder("auto", here=False) == "tensorrt-rtx"
    if has_code:
        assert engines.choose_builder("auto") == "tensorrt-rtx"
        return
    words = (
        r"Stand-in GPU has compute capability (9|10)\.0, and tensorrt-rtx builds for 7\.5, .*'wm-models\[tensorrt\]'"
    )
    with pytest.raises(ExportError, match=words):
        engines.choose_builder("auto")
    monkeypatch.setattr(engines, "installed", lambda builder: True)
    assert engines.choose_builder("auto") == "tensorrt"


def test_a_refused_node_is_named(made, tmp_path, monkeypatch):
    """With the module that it comes from and the builder's words; nothing is left."""
    prepare = engines.prepare_for_tensorrt

    def spoil(model, *args):
        prepare(model, *args)
        node = next(node for node in model.graph if node.op_type == "Softplus")
        node.op_type = "StringSplit"

    monkeypatch.setattr(engines, "prepare_for_tensorrt", spoil)
    words = r"refuses.*layers\.0\.self_attn\.key_bias\.softplus of model\.layers\.0\.self_attn\.key_bias.*StringSplit"
    with pytest.raises(ExportError, match=words):
        build_tensorrt(made("dense", "fp32").path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    assert not list(tmp_path.iterdir())


def test_a_lost_layer_is_found(made, tmp_path, monkeypatch):
    """An operator that became several layers, or none, may still be right, but nobody would know what it costs."""
    prepare = engines.prepare_for_tensorrt

    def spoil(model, *args):
        prepare(model, *args)
        node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node)

    monkeypatch.setattr(engines, "prepare_for_tensorrt", spoil)
    with pytest.raises(ExportError, match=r"\d+ layers of \d+ RotaryEmbedding nodes.*of model\.layers\.0\.self_attn"):
        build_tensorrt(made("dense", "fp32").path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_crashes_is_an_error(made, tmp_path, monkeypatch):
    """The builder has a process of its own."""
    monkeypatch.setattr(tensorrt_builder.subprocess, "Popen", dies(subprocess.Popen))
    with pytest.raises(ExportError, match=r"tensorrt-rtx died while building \(exit code -11\)"):
        build_tensorrt(made("dense", "fp32").path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))
    assert not list(tmp_path.iterdir())


def dies(popen):
    code = "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGSEGV)"
    return lambda command, **options: popen([sys.executable, "-c", code], **options)


def test_the_builder_ignores_the_working_directory(made, tmp_path, monkeypatch):
    """A module there of the name of one that the builder's program imports is not imported."""
    for name in ("json", "tensorrt_rtx"):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path / "here")
    build_tensorrt(made("dense", "fp32").path, tmp_path / "out", TensorRTOptions(builder="tensorrt-rtx"))


def test_ctrl_c_leaves_nothing(made, tmp_path):
    arguments = [
        "tensorrt",
        str(made("dense", "fp16").path),
        "--out",
        str(tmp_path / "out"),
        "--builder",
        "tensorrt-rtx",
    ]
    code, errors = interrupted(arguments, tmp_path, ".out*/*.log")  # once the builder is at work
    assert code == 130, errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_from_a_checkpoint(tmp_path):
    """The whole way, and the ONNX artifact inside is a verified one."""
    save_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    arguments = ["tensorrt", tmp_path / "checkpoint", "--out", tmp_path / "out", "--max-length", 64, "--dtype", "fp16"]
    code = "from export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in ("attention fused in 1 of 1 layers", "3 caches updated in place", "8.0, 8.6, 8.9, 12.0"):
        assert words in done.stdout
    assert read_artifact(tmp_path / "out").verified
    engine = tmp_path / "out" / "model.tensorrt-rtx.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"engine: has \d+ bytes; the manifest says"):
        read_artifact(tmp_path / "out")
