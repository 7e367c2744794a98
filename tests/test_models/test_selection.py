"""Selection by blocks equals attention under a mask over all keys: outputs and gradients, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_models.layers.attention import attend_packed, keep_largest, pack_keys
from wm_models.layers.selection import attend_blocks

SIZE = 8
SCALE = SIZE**-0.5


def attend_all(query, key, value, bias, keep, real, documents):
    """The same by a mask (B, H, S, S)."""
    length, heads = query.shape[2:0:-1]
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(query.shape[0], 1, -1, -1)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None])
    if real is not None:
        visible = visible & real[:, :, None]
    mask = keep_largest(bias.detach()[:, :, None], visible, keep) > torch.finfo(bias.dtype).min
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    if real is not None:  # no row without a key, whose softmax has no value
        mask = mask | (torch.eye(length, dtype=torch.bool) & ~real[..., None])
    return attend_packed(query, *pack_keys(key, value, bias), SCALE, mask)


def draw_inputs(seed, batch, heads, groups, length, per_query_head, biases, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads * groups, length, SIZE), (batch, heads, length, SIZE), (batch, heads, length, SIZE)]
    vectors = [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]
    shape = (batch, heads * groups if per_query_head else heads, length)
    bias = {
        "random": torch.rand(shape, generator=draw, dtype=dtype) * 3,
        "equal": torch.ones(shape, dtype=dtype),  # A = 0, as training starts
        "few": torch.randint(1, 4, shape, generator=draw).to(dtype),
    }[biases]
    return [part.requires_grad_() for part in (*vectors, bias)], draw


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(2, 90),
    keep=st.integers(1, 89),
    block=st.integers(1, 64),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_query_head=st.booleans(),
    biases=st.sampled_from(["random", "equal", "few"]),
    rows=st.sampled_from(["whole", "padded left", "padded right", "documents"]),
)
def test_blocks_equal_the_mask(seed, length, keep, block, heads, groups, per_query_head, biases, rows):
    keep = min(keep, length - 1)
    inputs, draw = draw_inputs(seed, 2, heads, groups, length, per_query_head, biases)
    real = documents = None
    if rows == "documents":
        documents = (torch.rand(2, length, generator=draw) < 0.1).cumsum(-1)
    elif rows != "whole":
        real = torch.ones(2, 1, length, dtype=torch.bool)
        real[0, :, : length // 3] = False
        real = real.flip(-1) if rows == "padded right" else real
    counts = torch.ones(()) if real is None else real[..., None]
    expected = attend_all(*inputs, keep, real, documents) * counts
    numbers = documents if real is None else real[:, 0].long() - 1
    found = attend_blocks(*inputs, SCALE, keep, block, numbers) * counts
    slope = torch.randn(expected.shape, generator=draw, dtype=expected.dtype)
    slopes = [torch.autograd.grad(y, inputs, slope) for y in (expected, found)]
    for one, other in zip((expected, *slopes[0]), (found, *slopes[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("biases", ["random", "equal", "few"])
def test_float32_against_float64(biases):
    inputs, _ = draw_inputs(0, 1, 2, 2, 600, False, biases)
    narrow = [part.detach().float().requires_grad_() for part in inputs]
    exact = attend_all(*inputs, 64, None, None)
    found = attend_blocks(*narrow, SCALE, 64, 32)
    slopes = torch.autograd.grad(exact.square().sum(), inputs), torch.autograd.grad(found.square().sum(), narrow)
    for one, other in zip((exact, *slopes[0]), (found, *slopes[1]), strict=True):
        assert (one - other.double()).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.slow
def test_one_graph_and_no_recompilation():
    """Of one shape, whatever the data: documents move, biases change."""
    compiled = torch.compile(attend_blocks, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            inputs, draw = draw_inputs(seed, 1, 1, 2, 100, False, "random", torch.float32)
            documents = (torch.rand(1, 100, generator=draw) < 0.1).cumsum(-1)
            found = compiled(*inputs, SCALE, 16, 32, documents)
            found.sum().backward()
            expected = attend_all(*(part.detach() for part in inputs), 16, None, documents)
            torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
