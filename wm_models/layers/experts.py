"""Cross domain mixture of experts (paper, section 3.3): a shared gated MLP plus a few of E one-row experts a token.

B batch, S tokens, N = B·S, D hidden size, E experts, n = sqrt(E), h router heads, k experts a head, r retrieval size.
"""

from collections.abc import Callable
from typing import Any

import einx
import torch
from torch import nn
from torch.nn import functional as F

from wm_models.configuration import DogeConfig
from wm_models.layers.mlp import GatedMLP


def staircase(n: int, k: int) -> torch.Tensor:
    """The pairs (i, j) with (i + 1)(j + 1) <= k, as columns of (2, P) int64 on the CPU: about k·ln k of them.

    The k largest sums of two sorted lists of n lie among them: any other pair has at least k pairs that are no smaller
    before it.
    """
    pairs = [(i, j) for i in range(min(n, k)) for j in range(min(n, k // (i + 1)))]
    return torch.tensor(pairs, device="cpu").T.contiguous()


def best_pairs(scores: torch.Tensor, k: int, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the n² sums of two lists, exactly: scores (N, 2, n), `staircase(n, k)` (2, P).

    Returns the sums (N, k), largest first, and the experts i·n + j (N, k), int64, that they belong to.
    """
    n, width = scores.shape[-1], min(k, scores.shape[-1])
    best, index = scores.topk(width, dim=-1)
    chosen = best.flatten(-2).index_select(-1, (pairs + pairs.new_tensor([[0], [width]])).flatten())
    # one token at a time, for einx would make constants of sizes that an export leaves open
    sums, pair = torch.vmap(_pair_sums)(chosen).topk(k, dim=-1)
    i, j = pairs[0][pair], pairs[1][pair]
    return sums, index[:, 0].gather(-1, i) * n + index[:, 1].gather(-1, j)


def _pair_sums(chosen: torch.Tensor) -> torch.Tensor:
    return einx.sum("([list] pair) -> pair", chosen, list=2)


class SelectDot(torch.autograd.Function):
    """`x_t · table[index_tk]` for every token and choice, with no copy of the chosen rows: (N, k).

    It is the gradient of a weighted `embedding_bag` with respect to the weights, for which torch has a kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x (N, D), table (E, D), index (N, k) int64."""
        ctx.save_for_backward(x, table, index)
        flat, starts, owners = _bags(index)
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, flat, starts, owners, 0)
        return dots.view(index.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, table, index = ctx.saved_tensors
        (gradient,) = gradients
        return select_sum(gradient, table, index), _scatter(gradient, x, table, index), None


def _bags(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The choices of all tokens in a row, where each token's start, and whose each is: what embedding_bag takes."""
    tokens, k = index.shape
    steps = torch.arange(tokens, device=index.device)
    return index.flatten(), steps * k, steps.repeat_interleave(k)


def _scatter(weights: torch.Tensor, x: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Σ over tokens and choices of `weights_tk · x_t`, added up in row `index_tk`: (E, D)."""
    flat, starts, owners = _bags(index)
    sizes = torch.full_like(starts, index.shape[1])
    return torch.ops.aten._embedding_bag_dense_backward(
        x, flat, owners, sizes, sizes, table.shape[0], False, 0, weights.flatten()
    )


def select_sum(weights: torch.Tensor, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`Σ_k weights_tk · table[index_tk]`, with no copy of the chosen rows: weights and index (N, k) -> (N, D)."""
    return F.embedding_bag(index, table, per_sample_weights=weights.to(table.dtype), mode="sum")


class ExpertMixture(nn.Module):
    """What the chosen experts of each token add."""

    def forward(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """x (N, D), experts (N, h·k) int64 and their weights (N, h·k), the tables down and up (E, D) -> (N, D)."""
        strength: torch.Tensor = SelectDot.apply(x, down, experts)  # type: ignore[assignment]
        return select_sum(act_fn(strength) * weights, up, experts)


class ExpertMLP(GatedMLP):
    """`MLP(x) + Σ_k g_k · up_embed[e_k]`, `g = act(x · down_embed[e]) · softmax_k(score)`, summed over router heads.

    A subclass says where the scores come from.
    """

    pairs: torch.Tensor

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.heads, self.list_length, self.top_k = config.num_expert_heads, config.expert_keys, config.experts_per_head
        self.down_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.up_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.mixture = ExpertMixture()
        self.register_buffer("pairs", staircase(self.list_length, self.top_k), persistent=False)

    def start_values(self) -> dict[str, torch.Tensor]:
        """The buffer's value, on the CPU: it is in no checkpoint, so loading asks for it again."""
        return {"pairs": staircase(self.list_length, self.top_k)}

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Router scores of every head's two lists, (B, S, h, 2, n)."""
        raise NotImplementedError

    def route(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k experts of each head with the largest score sums, from scores (B, S, h, 2, n).

        Returns their indices (N, h·k), int64, and their weights (N, h·k), which sum to one in each head
        (so transformers' `norm_topk_prob` changes nothing).
        """
        top, experts = best_pairs(scores.flatten(0, 2), self.top_k, self.pairs)
        width = self.heads * self.top_k
        return experts.view(-1, width), top.softmax(-1).view(-1, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output (B, S, D) and its router scores (B, S, h, 2, n)."""
        scores = self.scores(x)
        tables = self.down_embed.weight, self.up_embed.weight
        routed = self.mixture(x.flatten(0, 1), *self.route(scores), *tables, self.act_fn)
        return super().forward(x)[0] + routed.view(x.shape), scores


class GateExperts(ExpertMLP):
    """One linear gate gives the scores, split for each token or, as in the published weights, for the whole batch."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.batch_split = config.expert_routing == "batch"
        self.router_gate = nn.Linear(config.hidden_size, 2 * self.list_length, bias=False)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 1, 2, self.list_length)
        logits = self.router_gate(x)
        if self.batch_split:
            logits = logits.reshape(2, -1, self.list_length).transpose(0, 1)
        return logits.reshape(shape)


class ProductKeyExperts(ExpertMLP):
    """Product keys: each head's query, in two halves, is compared with n learned keys for each half."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        half = config.expert_retrieval_size // 2
        self.queries = nn.Linear(config.hidden_size, 2 * self.heads * half, bias=False)
        self.keys = nn.Parameter(torch.zeros(self.heads, self.list_length, 2, half))
        self.deviation = config.initializer_range

    def start_values(self) -> dict[str, torch.Tensor]:
        """Keys as the linear layers' weights: normal, with the config's standard deviation."""
        return {**super().start_values(), "keys": torch.empty_like(self.keys).normal_(std=self.deviation)}

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries(x).view(*x.shape[:2], 2, self.heads, 1, -1).transpose(2, 3)  # (B, S, h, 2, 1, r/2)
        return (queries @ self.keys.permute(0, 2, 3, 1))[..., 0, :]


def feed_forward(config: DogeConfig) -> GatedMLP:
    """The feed-forward part of a layer, as the config says."""
    if not config.is_moe:
        return GatedMLP(config)
    return ProductKeyExperts(config) if config.expert_routing == "product_keys" else GateExperts(config)
