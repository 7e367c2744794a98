"""The parts of attention, each against the plainest way to say what it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_models.layers.attention import keep_largest

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
