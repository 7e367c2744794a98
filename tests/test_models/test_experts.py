"""Routing and mixing, each against the plainest way to say it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_models import DogeConfig
from wm_models.layers.experts import ProductKeyExperts, SelectDot, best_pairs, feed_forward, select_sum, staircase


@st.composite
def lists(draw):
    """Two lists of n scores in any order, no two of whose sums are equal, and k of the n² sums to take."""
    n = draw(st.integers(1, 12))
    distinct = st.lists(st.integers(0, 499), min_size=n, max_size=n, unique=True)
    first, second = 500.0 * torch.tensor(draw(distinct)), 1.0 * torch.tensor(draw(distinct))
    return torch.stack([first, second])[None], draw(st.integers(1, n * n))


@settings(deadline=None)
@given(lists())
def test_the_staircase_holds_the_best_pairs(case):
    """As the full search over all n² sums."""
    scores, k = case
    expected, index = (scores[0, 0][:, None] + scores[0, 1]).flatten().topk(k)
    sums, experts = best_pairs(scores, k, staircase(scores.shape[-1], k))
    assert torch.equal(sums[0], expected)
    assert torch.equal(experts[0], index)


@pytest.mark.parametrize(("n", "k"), [(128, 64), (32, 8), (8, 64), (128, 1)])
def test_the_staircase_is_short(n, k):
    pairs = staircase(n, k)
    assert pairs.shape[1] >= min(k, n * n)
    assert pairs.shape[1] <= k * (1 + math.log(k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selected_rows(dtype):
    table, x, index = torch.randn(30, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), torch.randint(0, 30, (5, 4))
    limit = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-5}
    dots = SelectDot.apply(x, table, index)
    torch.testing.assert_close(dots, torch.einsum("nd,nkd->nk", x, table[index]), **limit)
    torch.testing.assert_close(select_sum(dots, table, index), torch.einsum("nk,nkd->nd", dots, table[index]), **limit)


def test_gradients_of_selected_rows():
    """Against finite differences, with rows chosen by several tokens and twice by one."""
    table, x = torch.randn(6, 5, dtype=torch.double, requires_grad=True), torch.randn(4, 5, dtype=torch.double)
    index = torch.tensor([[0, 1, 1], [2, 1, 5], [0, 0, 0], [5, 4, 3]])
    torch.autograd.gradcheck(lambda x, table: SelectDot.apply(x, table, index), (x.requires_grad_(), table))
    weights = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(lambda weights, table: select_sum(weights, table, index), (weights, table))


@torch.no_grad()
def test_product_keys_score_each_half_of_each_head():
    config = DogeConfig(
        hidden_size=32, num_attention_heads=4, is_moe=True, expert_routing="product_keys", num_experts=25,
        num_experts_per_tok=6, num_expert_heads=2, expert_retrieval_size=16,
    )  # fmt: skip
    layer = feed_forward(config)
    assert isinstance(layer, ProductKeyExperts)
    torch.nn.init.normal_(layer.keys)
    x = torch.randn(2, 3, 32)
    queries, scores = layer.queries(x).view(2, 3, 2, 2, 8), layer.scores(x)
    assert scores.shape == (2, 3, 2, 2, 5)
    for head in range(2):
        for half in range(2):
            expected = queries[:, :, half, head] @ layer.keys[head, :, half].T
            torch.testing.assert_close(scores[:, :, head, half], expected)
    experts, weights = layer.route(scores)
    assert experts.shape == weights.shape == (6, 6)
    torch.testing.assert_close(weights.view(6, 2, 3).sum(-1), torch.ones(6, 2))


@pytest.mark.parametrize("routing", ["token", "product_keys"])
def test_one_compiled_graph_for_any_batch_and_length(routing):
    """einx inside: no size of the batch or the sequence becomes a constant."""
    config = DogeConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=24, is_moe=True, expert_routing=routing,
        num_experts=64, num_experts_per_tok=6, num_expert_heads=2 if routing == "product_keys" else 1,
        expert_retrieval_size=16,
    )  # fmt: skip
    layer = feed_forward(config)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for index, (batch, length) in enumerate(((3, 7), (5, 9), (4, 30))):
        x = torch.randn(batch, length, 32)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-4, atol=1e-5)
