"""Quantised weights: the rounding, the two graphs over one file, and what it costs."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch

from export import ExportError, export_onnx
from export.quantize import block_size, round_to_nearest, round_with_feedback, scale_search


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


def test_feedback_without_correlation_is_a_scale_search():
    """Where inputs are independent no error can be made good elsewhere: each weight is rounded on its own."""
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = round_with_feedback(weight, 4, 64, 1e6 * torch.eye(128))
    for start in (0, 64):
        part = weight[:, start : start + 64]
        scale = scale_search(part, torch.ones(64), 7)
        torch.testing.assert_close(scales[:, start // 64, None], scale)
        torch.testing.assert_close(codes[:, start : start + 64], (part / scale).round().clamp(-8, 7))


def test_blocks():
    assert [block_size(columns) for columns in (768, 96, 64, 48, 40)] == [128, 32, 64, 16, None]


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_both_graphs_read_the_same_bytes_once(exported, name, bits):
    _, directory, _ = exported(name)
    portable, fused = (ir.load(directory / file) for file in ("model.onnx", "model.cpu.onnx"))
    count = Counter(node.op_type for node in portable.graph)
    assert {node.domain for node in portable.graph} == {""}
    assert count["DequantizeLinear"] == 3 * 5 + 1  # qkv, o, gate, up, down; embedding and head are one table
    kinds = Counter(node.op_type for node in fused.graph)
    assert (kinds["MatMulNBits"], kinds["GatherBlockQuantized"]) == (3 * 5 + 1, 1)
    assert kinds["MatMul"] == 3  # the bias's dt
    spans = []
    for graph in (portable, fused):
        tensors = [value.const_value for value in graph.graph.initializers.values()]
        spans.append({(t.offset, t.length) for t in tensors if isinstance(t, ir.ExternalTensor)})
    assert spans[0] == spans[1]
    exact = (exported("dense")[1] / "model.onnx.data").stat().st_size
    assert (directory / "model.onnx.data").stat().st_size < exact * (bits + 2) / 32


@pytest.mark.parametrize("options", [{"quantize": "int3"}, {"quantize": "int8", "dtype": "fp16"}])
def test_option_errors(exported, tmp_path, options):
    with pytest.raises(ExportError, match="--quantize"):
        export_onnx(exported("dense")[0], tmp_path / "artifact", **options)


def test_a_flipped_code_order_is_found(exported, tmp_path, monkeypatch):
    """Codes swapped in pairs, as if the two halves of a byte were."""
    from export import quantize

    replace = quantize._replace

    def swapped(graph, use, codes, *rest):
        replace(graph, use, codes.reshape(len(codes), -1, 2)[..., ::-1].reshape(codes.shape), *rest)

    monkeypatch.setattr(quantize, "_replace", swapped)
    verdicts = export_onnx(exported("int8")[0], tmp_path / "artifact", quantize="int8", max_length=100)
    assert not any(verdict.passed for verdict in verdicts)
