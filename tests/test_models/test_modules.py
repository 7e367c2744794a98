"""The paper's parts by hand: as its own implementation computes them, compiled, and as ONNX of any batch and length."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import assert_close, golden
from transformers import DynamicCache

from export.forms import FormOptions, replace_layers
from wm_models import CDMoE, DMAttn


def test_dmattn_as_a_reader_calls_it():
    x, attention_mask = torch.rand(2, 16, 64), torch.ones(2, 16)
    attention = DMAttn(d_model=64, n_heads=1, max_position_embeddings=16, layer_idx=0)
    y, past_key_values = attention(x, attention_mask)
    assert y.shape == (2, 16, 64)
    assert past_key_values is None
    assert torch.equal(attention.A, torch.ones(1))


def test_dmattn_takes_the_cache_under_its_earlier_name():
    attention, cache = DMAttn(d_model=64, n_heads=1, max_position_embeddings=16, layer_idx=0), DynamicCache()
    with pytest.warns(FutureWarning, match="past_key_values"):
        _, returned = attention(torch.rand(2, 16, 64), past_key_values=cache)
    assert returned is cache
    assert cache.get_seq_length() == 16


def test_cdmoe_as_a_reader_calls_it():
    mixture = CDMoE(
        d_model=64, act_fn="silu", d_ff=256, d_private_expert_retrieval=64, n_experts=64, n_experts_heads=1,
        n_experts_per_head=2,
    )  # fmt: skip
    assert mixture(torch.rand(2, 16, 64)).shape == (2, 16, 64)


def made(name):
    """The module with a golden's weights; its inputs, as the arguments of a call; what is real of its output."""
    reference = golden(f"module-{name}")
    module = {"dmattn": DMAttn, "cdmoe": CDMoE}[name](**reference.config).eval()
    module.load_state_dict(reference.state)
    mask = reference.inputs.get("attention_mask")
    x, expected = reference.inputs["hidden_states"], reference.outputs["hidden_states"]
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return module, (x,) if mask is None else (x, mask), expected, real


def output(result):
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
@pytest.mark.parametrize("name", ["dmattn", "cdmoe"])
def test_golden(name):
    module, arguments, expected, real = made(name)
    assert_close(output(module(*arguments))[real], expected[real])


@pytest.mark.parametrize("name", ["dmattn", "cdmoe"])
def test_compiled_with_gradients(name):
    module, arguments, expected, real = made(name)
    found = output(torch.compile(module, fullgraph=True)(*arguments))
    assert_close(found[real], expected[real])
    found.sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    output(module(*arguments)).sum().backward()
    for gradient, parameter in zip(gradients, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dmattn", "cdmoe"])
def test_exported(name, tmp_path):
    module, arguments, _, _ = made(name)
    if name == "cdmoe":
        replace_layers(module, FormOptions())
    open_dims = {0: "batch", 1: "length"}
    program = torch.onnx.export(
        module, arguments, dynamo=True, opset_version=24, verbose=False, dynamic_shapes=(open_dims,) * len(arguments)
    )
    program.save(tmp_path / "module.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "module.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((2, 16), (1, 1), (3, 7)):
        inputs = [torch.randn(batch, length, *arguments[0].shape[2:])]
        inputs += [torch.ones(batch, length) for _ in arguments[1:]]
        feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
        np.testing.assert_allclose(
            session.run(None, feed)[0], output(module(*inputs)).numpy(), atol=1e-5, err_msg=f"{batch}, {length}"
        )
