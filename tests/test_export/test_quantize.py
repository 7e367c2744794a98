"""Quantised weights: the rounding, the two graphs over one file, and what it costs."""

import shutil
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import baseline, ours
from transformers import PreTrainedTokenizerFast

from export import ExportError, OnnxOptions, export_onnx
from export.bench.cost import linear_layers
from export.lower import OnnxContext
from export.quantization.calibration import second_moments, written_moments
from export.quantization.gptq import DAMPING, damping_of, round_with_feedback, scale_search
from export.quantization.nearest import round_to_nearest
from export.quantization.schemes import SCHEMES
from export.quantization.weights import activations, block_size, quantizable
from runtime import load
from runtime.artifact.integrity import read_artifact
from wm_models import shipped_checkpoint
from wm_models.shipped import TRAINED
from wm_models.training import Recipe


def dequantized(codes, scales):
    return (codes.view(*scales.shape, -1) * scales[..., None]).view_as(codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [32, 128])
def test_nearest_is_within_half_a_step(bits, block):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    codes, scales = round_to_nearest(weight, bits, block)
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    error = (dequantized(codes, scales) - weight).abs().view(48, -1, block)
    assert (error <= scales[..., None] * 0.5001).all()


def test_feedback_loses_less_of_the_product():
    """On correlated inputs, in float64, against rounding to nearest with the same bits and blocks."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=draw) * torch.logspace(0, -2, 256)
    inputs, weight = torch.randn(2000, 256, generator=draw) @ mixing.T, torch.randn(96, 256, generator=draw)
    moments = inputs.T @ inputs
    errors = {}
    for name, (codes, scales) in {
        "nearest": round_to_nearest(weight, 4, 64),
        "feedback": round_with_feedback(weight, 4, 64, moments),
    }.items():
        assert codes.min() >= -8
        assert codes.max() <= 7
        difference = (dequantized(codes, scales) - weight).double()
        errors[name] = (inputs.double() @ difference.T).square().mean()
    assert errors["feedback"] < 0.5 * errors["nearest"]


def test_feedback_without_correlation_rounds_each_weight_on_its_own():
    """Where inputs are independent no error can be made good elsewhere; the scales lose least for these codes."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    codes, scales = round_with_feedback(weight, 4, 64, 1e6 * torch.eye(128))
    whole = scales.repeat_interleave(64, 1)
    assert ((codes * whole - weight).abs() <= 0.51 * whole.abs())[codes.abs() < 7].all()
    searched = scale_search(weight.T.reshape(2, 64, 40), torch.ones(2, 64), 7).T.repeat_interleave(64, 1)
    nearest = (weight / searched).round().clamp(-8, 7) * searched
    rest = torch.arange(40) != 7
    assert ((codes * whole - weight).square().sum(1) < (nearest - weight).square().sum(1))[rest].all()
    assert not codes[7].any()
    torch.testing.assert_close(
        (codes * (codes * whole - weight)).view(40, 2, 64).sum(-1), torch.zeros(40, 2), atol=2e-3, rtol=0
    )


def test_the_largest_weight_of_a_block_has_the_lowest_code():
    """Of -8 to 7: a block loses as much as its mirror image, and the scale has the other sign."""
    blocks = torch.randn(3, 64, 40, generator=torch.Generator().manual_seed(0))
    scales = scale_search(blocks, torch.ones(3, 64), 7)
    torch.testing.assert_close(scale_search(-blocks, torch.ones(3, 64), 7), -scales)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    assert (scales * largest < 0).all()


def test_damping_grows_where_moments_are_chance():
    """Few tokens that spread over all directions, against many, or tokens that lie in a few."""
    draw = torch.Generator().manual_seed(0)
    few, weight = torch.randn(1000, 256, generator=draw), torch.randn(96, 256, generator=draw)
    narrow = few * torch.logspace(0, -3, 256)
    spread, concentrated = damping_of(few.T @ few, len(few)), damping_of(narrow.T @ narrow, len(few))
    assert DAMPING[0] < concentrated < spread / 4
    assert damping_of(narrow.T @ narrow, 4 * len(few)) < 0.3 * concentrated
    losses = []
    for share in (DAMPING[0], spread):
        codes, scales = round_with_feedback(weight, 4, 64, few.T @ few, share)
        losses.append((dequantized(codes, scales) - weight).square().mean())  # inputs to come are independent
    assert losses[1] < 0.95 * losses[0]


def test_a_bias_left_out_is_found_though_a_is_zero(tmp_path, monkeypatch):
    """Where A is 0 all biases are equal, and only the comparison with A drawn at random sees them."""
    model = ours(baseline(), expert_routing="token")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.A)
    model.save_pretrained(tmp_path / "checkpoint")
    attend = OnnxContext.attend
    without = lambda s, layer, q, k, v, bias, scale: attend(s, layer, q, k, v, bias * 0, scale)  # noqa: E731
    monkeypatch.setattr(OnnxContext, "attend", without)
    verdicts = export_onnx(
        tmp_path / "checkpoint", tmp_path / "out", OnnxOptions(quantize="int8", max_length=64, max_batch=2)
    )
    assert [verdict.case for verdict in verdicts if not verdict.passed] == ["A drawn at random, prompts (33, 5)"]


def test_the_head_is_calibrated_on_every_token(exported, tmp_path):
    """The graph chooses one token of a row before the head; its second moments are over all of them."""
    directory = tmp_path / "exact"
    shutil.copytree(exported("dense")[1], directory)
    graph = ir.load(directory / "model.onnx")
    (head,) = (use for use in quantizable(graph) if use.looked_up)
    assert head.activation is not None
    text = np.random.default_rng(0).integers(0, 211, (3, 50))
    moments = second_moments(graph, directory / "moments.onnx", text, [head.activation])[head.activation]
    assert torch.linalg.matrix_rank(moments) == 64


@pytest.mark.parametrize("name", ["dense", "experts", "classifier"])
def test_moments_of_written_text_are_those_of_a_pass_over_it(exported, tmp_path, name):
    """They are summed in steps of one token, as the text is written; a classifier reads all of its text at once."""
    directory = tmp_path / "exact"
    shutil.copytree(exported(name)[1], directory)
    artifact = read_artifact(directory)
    graph = ir.load(directory / artifact.graph.file)
    text, found = written_moments(artifact, activations(graph))
    read = text if artifact.graph.labels else text[:, :-1]  # the last token is written, and not read
    expected = second_moments(graph, directory / "moments.onnx", read, activations(graph))
    assert found.keys() == expected.keys()
    for value, sums in expected.items():
        torch.testing.assert_close(found[value], sums, rtol=1e-4, atol=1e-4 * float(sums.diagonal().max()))
        torch.testing.assert_close(found[value], found[value].T, rtol=1e-5, atol=1e-5 * float(sums.diagonal().max()))


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The shipped model in float32."""
    export_onnx(TRAINED, directory := tmp_path_factory.mktemp("exact") / "artifact")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block", "kl", "perplexity"),
    [("int8", None, 2e-3, 1.002), ("int4", None, 3e-2, 1.03), ("int4", 128, 3e-2, 1.03)],
)
def test_what_quantisation_costs_the_shipped_model(exact, tmp_path, name, block, kl, perplexity):
    """On the export's own checks, and on files of the standard library that it was not trained on."""
    verdicts = export_onnx(TRAINED, tmp_path / name, OnnxOptions(quantize=name, block_size=block))
    expected_blocks = {"int8": {128}, "int4": {32, block or 32}}[name]
    assert {each.block for each in linear_layers(load(tmp_path / name).artifact) if each.bits} == expected_blocks
    assert all(verdict.passed for verdict in verdicts)
    assert max(verdict.mean_kl for verdict in verdicts) <= kl
    sizes = [(made / "model.onnx.data").stat().st_size for made in (tmp_path / name, exact)]
    assert sizes[0] <= sizes[1] * {"int8": 0.29, "int4": 0.17}[name]
    rows = held_out_rows(256)
    expected, found = (log_probabilities(made, rows) for made in (exact, tmp_path / name))
    assert (np.exp(expected) * (expected - found)).sum(-1).mean() <= kl
    costs = [-np.take_along_axis(each[:, :-1], rows[:, 1:, None], -1).mean() for each in (expected, found)]
    assert np.exp(costs[1] - costs[0]) <= perplexity


def held_out_rows(length):
    """Ids (B, length), of the middle of each file that the shipped model's recipe holds out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [library / name for name in Recipe.load(TRAINED, {}).held_out]
    found = [path for path in paths if path.exists()]  # some distributions leave out idlelib
    assert len(found) >= 0.9 * len(paths)
    files = [tokenizer(path.read_text())["input_ids"] for path in found]
    starts = [(len(ids) - length) // 2 for ids in files]
    return np.array([ids[at : at + length] for ids, at in zip(files, starts, strict=True) if at >= 0])


def log_probabilities(directory, rows):
    """(B, S, V), of a model that is told each row token by token."""
    engine = load(directory)
    logits = []
    for part in np.array_split(rows, -(-len(rows) // engine.graph.max_batch)):
        engine.reset()
        engine.reserve(*part.shape)
        logits.append(np.stack([engine.decode(column).copy() for column in part.T], axis=1))
    logits = np.concatenate(logits).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_blocks():
    sizes = (768, 96, 64, 48)
    assert [block_size(columns, 128) for columns in sizes] == [128, 32, 64, 16]
    assert [block_size(columns, 32) for columns in sizes] == [32, 32, 32, 16]


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_both_graphs_read_the_same_bytes_once(exported, name, bits):
    _, directory, _ = exported(name)
    portable, fused = (ir.load(directory / file) for file in ("model.onnx", "model.cpu.onnx"))
    count = Counter(node.op_type for node in portable.graph)
    assert {node.domain for node in portable.graph} == {""}
    assert count["DequantizeLinear"] == 3 * 5 + 1  # qkv, o, gate, up, down; embedding and head are one table
    kinds = Counter(node.op_type for node in fused.graph)
    look_up = {"int4": "GatherBlockQuantized", "int8": "DequantizeLinear"}[name]
    assert (kinds["MatMulNBits"], kinds[look_up]) == (3 * 5 + 1, 1)
    assert kinds["MatMul"] == 3  # the bias's dt
    spans = []
    for graph in (portable, fused):
        tensors = [value.const_value for value in graph.graph.initializers.values()]
        spans.append({(t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)})
    assert spans[0] == spans[1]
    exact = (exported("dense")[1] / "model.onnx.data").stat().st_size
    assert (directory / "model.onnx.data").stat().st_size < exact * (bits + 2) / 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int3"}, "--quantize is"),
        ({"quantize": "int8", "dtype": "fp16"}, "--quantize is"),
        ({"quantize": "int4", "block_size": 48}, "--block-size is 48"),
        ({"block_size": 64}, "--block-size is 64 with --quantize unset"),
    ],
)
def test_option_errors(exported, tmp_path, options, words):
    with pytest.raises(ExportError, match=words):
        export_onnx(exported("dense")[0], tmp_path / "artifact", OnnxOptions(**options))


def test_a_flipped_code_order_is_found(exported, tmp_path, monkeypatch):
    """Codes swapped in pairs, as if the two halves of a byte were."""
    scheme = SCHEMES["int8"]

    def swapped(weight):
        codes, scales = scheme.round(weight)
        return codes.view(len(codes), -1, 2).flip(-1).view_as(codes), scales

    monkeypatch.setitem(SCHEMES, "int8", replace(scheme, round=swapped))
    verdicts = export_onnx(exported("int8")[0], tmp_path / "artifact", OnnxOptions(quantize="int8", max_length=100))
    *own, portable = verdicts
    assert not any(verdict.passed for verdict in own)
    assert portable.passed  # both graphs read the same codes


def test_codes_that_one_graph_misreads_are_found(exported, tmp_path, monkeypatch):
    """As if ONNX Runtime's operators took the codes for numbers without a sign."""
    from export.package import graph_files

    rewrite = graph_files.use_cpu_quantized_operators

    def unflipped(graph):
        graph = rewrite(graph)
        for name, value in graph.graph.initializers.items():
            if name.startswith("highest.bit"):
                value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=name)
        return graph

    monkeypatch.setattr(graph_files, "use_cpu_quantized_operators", unflipped)
    verdicts = export_onnx(exported("int8")[0], tmp_path / "artifact", OnnxOptions(quantize="int8", max_length=100))
    assert not any(verdict.passed for verdict in verdicts)
