"""The router's load-balancing loss.

B batch, S tokens, E experts, n = sqrt(E), h router heads, k experts a head, N = layers · B · S · h.
"""

from collections.abc import Sequence

import torch

from .experts import best_pairs, staircase


def load_balancing_loss(
    router_scores: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`E · Σ_e f_e · p_e` over all layers and heads (Switch Transformer, equations 4 to 6): a scalar.

    `f_e` is the share of choices that fell on expert e, `p_e` its mean routing probability. `router_scores` holds one
    (B, S, h, 2, n) tensor a layer, of which each head chooses `top_k`; `attention_mask` (B, S) leaves padding out.

    The softmax over all n² sums is the outer product of the softmaxes of the two lists, so the mean probabilities are
    one (n, N) by (N, n) product and no tensor of N·E exists.
    """
    stacked = torch.stack(list(router_scores))
    scores = stacked.flatten(0, 3)  # (N, 2, n)
    keys = scores.shape[-1]
    weight = scores.new_ones(scores.shape[0])
    if attention_mask is not None:
        weight = attention_mask.to(scores.dtype)[None, ..., None].expand(stacked.shape[:4]).flatten()
    first, second = scores.softmax(-1).unbind(1)
    probability = (first * weight[:, None]).T @ second / weight.sum()  # (n, n)

    experts = best_pairs(scores, top_k, staircase(keys, top_k).to(scores.device))[1]
    chosen = scores.new_zeros(keys * keys).scatter_add(0, experts.flatten(), weight.repeat_interleave(top_k))
    return keys * keys * (chosen / weight.sum() * probability.flatten()).sum() / top_k
