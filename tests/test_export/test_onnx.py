"""Every variant goes through, is verified, and a fault in the graph is found."""

import json
import shutil
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from export import ExportError, OnnxOptions, export_onnx, verify
from export import lower as graph
from export.package.manifest import capacities
from export.verification.cases import Case
from export.verification.comparison import compare
from runtime import ArtifactError, load
from runtime.artifact.manifest import INPUTS, LOGITS_INDEX
from test_export.conftest import VARIANTS, save_checkpoint
from wm_models import CheemsForCausalLM, DogeForCausalLM, DogeForSequenceClassification


@pytest.mark.parametrize("name", VARIANTS)
def test_verified(exported, name):
    _, directory, verdicts = exported(name)
    assert len(verdicts) >= 3
    assert all(verdict.passed for verdict in verdicts)
    assert json.loads((directory / "manifest.json").read_text())["verified"] is True
    record = json.loads((directory / "verification.json").read_text())
    assert record["passed"] is True
    assert len(record["comparisons"]) == len(verdicts)
    load(directory)


def test_plan_covers_what_is_promised(exported):
    _, _, verdicts = exported("window")
    names = " ".join(verdict.case for verdict in verdicts)
    for word in ("prompt 1,", "prompt 17,", "prompt 128,", "64 steps", "prompt 72", "ragged", "idle", "bucket"):
        assert word in names


def test_one_operator_each(exported):
    """The graph contract: three cache writes, one attention and two rotations a layer, weights stored once."""
    _, directory, _ = exported("dense")
    model = ir.load(directory / "model.onnx")
    count = Counter(node.op_type for node in model.graph)
    assert {node.domain for node in model.graph} == {""}
    assert model.opset_imports[""] == 24
    assert (count["TensorScatter"], count["Attention"], count["RotaryEmbedding"]) == (9, 3, 6)
    assert count["RMSNormalization"] == 3 * 4 + 1
    assert count["MatMul"] == 3 * 6 + 1
    weights = sum(p.numel() for p in DogeForCausalLM.from_pretrained(exported("dense")[0]).parameters()) * 4
    assert (directory / "model.onnx.data").stat().st_size < 1.1 * weights


def test_inputs_and_outputs_are_the_manifests(exported):
    _, directory, _ = exported("dense")
    model, manifest = ir.load(directory / "model.onnx").graph, json.loads((directory / "manifest.json").read_text())
    states = manifest["graph"]["states"]
    assert [v.name for v in model.inputs] == [*INPUTS, LOGITS_INDEX, *(state["input"] for state in states)]
    assert [v.name for v in model.outputs] == ["logits", *(state["output"] for state in states)]
    assert states[0]["shape"] == ["batch", 2, "capacity", 16]


def test_states_of_a_hybrid(exported):
    """Only attention's states grow; the manifest says it."""
    _, directory, _ = exported("hybrid")
    states = {s["input"]: s for s in json.loads((directory / "manifest.json").read_text())["graph"]["states"]}
    assert list(states) == ["layers.0.ssd", "layers.1.key", "layers.1.value", "layers.1.bias", "layers.2.ssd"]
    assert states["layers.0.ssd"]["shape"] == ["batch", 4, 16, 16]
    assert states["layers.1.key"]["shape"] == ["batch", 2, "capacity", 16]


def test_ssd_is_a_recurrence_for_one_token_and_chunks_for_more(exported):
    model = ir.load(exported("hybrid")[1] / "model.onnx")
    branches = [node for node in model.graph if node.op_type == "If"]
    assert len(branches) == 2
    then, other = (list(branches[0].attributes[name].as_graph()) for name in ("then_branch", "else_branch"))
    assert len(then) < 16
    assert not {node.op_type for node in then} & {"CumSum", "Pad"}
    assert not {node.op_type for node in other} & {"Loop", "Scan"}


@torch.no_grad()
def test_a_hybrid_runs_in_chunks_of_any_length(exported):
    """Prompts and steps of the runtime over one engine: each length in the same graph, and slots that sit out."""
    checkpoint, directory, _ = exported("hybrid")
    model, engine = CheemsForCausalLM.from_pretrained(checkpoint), load(directory)
    draw, rows = np.random.default_rng(0), [[], []]
    for new in ([1, 15], [16, 1], [17, 0], [1, 1], [0, 100], [200, 2], [1, 1]):
        ids = draw.integers(0, 211, (2, max(new)))
        found = engine.prefill(ids, new).copy()
        for slot, length in enumerate(new):
            rows[slot].extend(ids[slot, :length].tolist())
            if length:
                expected = model(torch.tensor(rows[slot])[None]).logits[0, -1].numpy()
                np.testing.assert_allclose(found[slot], expected, atol=2e-4)


@torch.no_grad()
def test_logits_of_all_positions(exported):
    checkpoint, directory, _ = exported("all logits")
    model, engine = DogeForCausalLM.from_pretrained(checkpoint), load(directory)
    ids = np.random.default_rng(0).integers(0, 211, (2, 30))
    expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(engine.prefill(ids, [30, 11]), expected[[0, 1], [29, 10]], atol=1e-4)


def test_dynamic_rope_beyond_the_trained_length(exported):
    """Four times the trained 128 is allowed, and each slot has its own length."""
    checkpoint, directory, _ = exported("dynamic rope")
    assert load(directory).graph.max_length == 512
    model, ids = DogeForCausalLM.from_pretrained(checkpoint), np.random.default_rng(0).integers(0, 211, (2, 300))
    found = load(directory).prefill(ids, [300, 50])
    with torch.no_grad():
        for row, length in ((0, 300), (1, 50)):
            expected = model(torch.from_numpy(ids[row : row + 1, :length])).logits[0, -1].numpy()
            np.testing.assert_allclose(found[row], expected, atol=1e-4)


@torch.no_grad()
def test_a_classifier_is_transformers_own(exported):
    """Texts of several lengths alone, and together in ragged batches, more of them than there are slots."""
    checkpoint, directory, _ = exported("classifier")
    model, engine = transformers.DogeForSequenceClassification.from_pretrained(checkpoint), load(directory)
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 211, length) for length in (1, 2, 17, 100, 300, 512, 64, 5, 230, 33, 8)]
    expected = [model(torch.from_numpy(text)[None]).logits[0].numpy() for text in texts]
    for text, logits in zip(texts, expected, strict=True):
        limit = 1e-4 * max(1, np.abs(logits).max())
        np.testing.assert_allclose(engine.classify(text)[0], logits, rtol=0, atol=limit)
    limit = 1e-4 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(engine.classify(texts), expected, rtol=0, atol=limit)
    padded = np.full((3, 110), 2)
    for row, text in zip(padded, texts[1:4], strict=True):
        row[: len(text)] = text
    found = engine.classify(padded)
    np.testing.assert_allclose(found, model(torch.from_numpy(padded)).logits, rtol=0, atol=limit)
    np.testing.assert_allclose(found, expected[1:4], rtol=0, atol=limit)


def test_a_classifier_is_verified_again_and_with_other_labels(exported, tmp_path):
    checkpoint, directory, _ = exported("classifier, one label")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    model = DogeForSequenceClassification.from_pretrained(other)
    model.score.weight.data.neg_()
    model.save_pretrained(other)
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert all(verdict.passed for verdict in verify(copy))
    assert not any(verdict.passed for verdict in verify(copy, str(other)))


def test_one_label_is_compared_by_its_size():
    """A softmax over one logit is always one, and would pass whatever that is."""
    case, logits = Case("", (1,), 3, (0,)), np.array([[-3.0], [0.5], [2.0], [5.0]])
    assert compare(case, [logits], [logits + 1e-3], 1e-3).passed
    assert not compare(case, [logits], [logits + 0.5], 1e-3).passed


def test_what_classifiers_are_refused(exported, tmp_path):
    for variant, words in (
        ("biased, untied", r"without a classifier's score\.weight"),
        ("hybrid", "is a classifier of Cheems"),
    ):
        checkpoint = shutil.copytree(exported(variant)[0], tmp_path / variant)
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["XForSequenceClassification"]}))
        with pytest.raises(ExportError, match=words):
            export_onnx(checkpoint, tmp_path / "artifact")


FAULTS = {
    "mask off by one": ("visible", lambda step: setattr(step, "visible", step.visible.roll(1, -1))),
    "cache one late": ("start", lambda step: setattr(step, "start", step.start + 1)),
    "rotation backwards": ("rotation", lambda step: setattr(step, "rotation", (step.rotation[0], -step.rotation[1]))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_graph_is_found(exported, tmp_path, monkeypatch, fault):
    checkpoint = exported("dense")[0]
    begin = graph.OnnxContext.__init__

    def broken(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        FAULTS[fault][1](self)

    monkeypatch.setattr(graph.OnnxContext, "__init__", broken)
    verdicts = export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(max_length=200))
    assert not all(verdict.passed for verdict in verdicts)
    with pytest.raises(ArtifactError, match="verification"):
        load(tmp_path / "artifact")
    load(tmp_path / "artifact", allow_unverified=True)


def test_a_bias_left_out_is_found(exported, tmp_path, monkeypatch):
    attend = graph.OnnxContext.attend
    without = lambda s, layer, q, k, v, bias, scale: attend(s, layer, q, k, v, bias * 0, scale)  # noqa: E731
    monkeypatch.setattr(graph.OnnxContext, "attend", without)
    verdicts = export_onnx(exported("dense")[0], tmp_path / "artifact", OnnxOptions(max_length=200))
    assert not all(verdict.passed for verdict in verdicts)


def test_verify_again_and_with_another_model(exported, tmp_path):
    checkpoint, artifact, _ = exported("one slot")
    directory = shutil.copytree(artifact, tmp_path / "artifact")
    assert all(verdict.passed for verdict in verify(directory))
    other = save_checkpoint(tmp_path / "other")
    model = DogeForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.model.layers[2].self_attn.A)
    model.save_pretrained(other)
    assert not all(verdict.passed for verdict in verify(directory, str(other)))
    with pytest.raises(ArtifactError):
        load(directory)
    assert all(verdict.passed for verdict in verify(directory, str(checkpoint)))
    load(directory)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int3"}, "--dtype is 'int3'"),
        ({"logits": "some"}, "--logits is 'some'"),
        ({"max_batch": 0}, "--max-batch is 0"),
        ({"max_length": 513}, "--max-length is 513.*allows 2 to 512"),
        ({"max_length": 1}, "--max-length is 1"),
        ({"kv_cache_dtype": "int4"}, "--kv-cache-dtype is 'int4' with --dtype fp32; expected int8"),
        ({"kv_cache_dtype": "int8", "dtype": "bf16"}, "--kv-cache-dtype is 'int8' with --dtype bf16; expected int8"),
    ],
)
def test_option_errors(exported, tmp_path, options, words):
    with pytest.raises(ExportError, match=words):
        export_onnx(exported("dense")[0], tmp_path / "artifact", OnnxOptions(**options))
    assert not list(tmp_path.iterdir())


def test_batch_routing_is_refused(tmp_path):
    from conftest import baseline

    baseline(is_moe=True, num_experts=16, num_experts_per_tok=2).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"expert_routing.*token"):
        export_onnx(tmp_path / "checkpoint", tmp_path / "artifact")


def test_an_occupied_directory_is_kept_until_the_new_one_is_whole(exported, tmp_path, monkeypatch):
    checkpoint, out = exported("dense")[0], tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(ExportError, match=r"not empty.*--force"):
        export_onnx(checkpoint, out)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("export.targets.onnx_artifact.save_graph", stop)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(checkpoint, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "kept"
    export_onnx(checkpoint, out, OnnxOptions(max_length=100, max_batch=1), force=True)
    assert not (out / "precious").exists()
    load(out)


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")  # as the library that writes the weights does: no file's name

    checkpoint = exported("dense")[0]
    monkeypatch.setattr("export.targets.onnx_artifact.save_graph", full)
    with pytest.raises(OSError, match=f"No space left.*{tmp_path / 'out'}"):
        export_onnx(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_capacities():
    sizes = capacities(2048)
    assert sizes == [*range(64, 1024, 64), *range(1024, 2048, 128), 2048]
    assert capacities(1 << 20)[-3:] == [917504, 983040, 1048576]
    assert capacities(100) == [64, 100]
    assert capacities(64) == [64]
    assert capacities(20) == [20]
