"""The parts of attention, each against the plainest way to say what it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_models.layers.attention import join_bias, keep_largest, split_bias

LOWEST = torch.finfo(torch.float32).min


@st.composite
def biases(draw):
    """A few bias values over L keys, causal visibility for the last S queries with some keys padded, and a window."""
    length = draw(st.integers(1, 24))
    queries, keep = draw(st.integers(1, length)), draw(st.integers(1, 12))
    bias = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=length, max_size=length))
    padded = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    visible = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
    return torch.tensor(bias), visible & ~torch.tensor(padded), keep


@settings(deadline=None)
@given(biases())
def test_exactly_the_largest_are_kept_and_the_later_of_equals(case):
    bias, visible, keep = case
    found = keep_largest(bias[None, None, None], visible[None, None], keep)[0, 0] > LOWEST
    for row, shown in zip(found, visible, strict=True):
        ranked = sorted(torch.nonzero(shown).flatten().tolist(), key=lambda j: (bias[j].item(), j), reverse=True)
        assert set(torch.nonzero(row).flatten().tolist()) == set(ranked[:keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_biases_make_a_sliding_window(dtype):
    bias, steps = torch.ones(1, 2, 1, 60, dtype=dtype), torch.arange(60)
    visible = steps <= steps[:, None]
    found = keep_largest(bias, visible[None, None], 7) > torch.finfo(dtype).min
    assert torch.equal(found[0, 1], visible & (steps > steps[:, None] - 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_three_narrow_digits_are_the_float32_bias(dtype, compiled):
    """A compiler that takes the two casts of a digit for none would leave the first digit alone."""
    bias = 1 + torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2.0 ** -torch.arange(1000).div(50)
    bias.requires_grad_()

    def halves(bias):
        digits = split_bias(bias, 3, dtype)
        return digits, join_bias(digits)[..., 0]

    digits, found = (torch.compile(halves, fullgraph=True) if compiled else halves)(bias)
    assert digits.dtype == dtype
    assert digits.shape == (1000, 3)
    assert torch.equal(found, bias)
    assert not torch.equal(digits[:, 0].float(), bias)
    (slope,) = torch.autograd.grad(found.sum(), bias)
    assert torch.equal(slope, torch.ones_like(bias))
