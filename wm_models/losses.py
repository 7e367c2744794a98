"""The router's load-balancing loss.

B batch, S tokens, E experts, n = sqrt(E), k experts a token, N = layers · B · S.
"""

from collections.abc import Sequence

import einx
import torch


def load_balancing_loss(
    router_scores: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`E · Σ_e f_e · p_e` over all layers (Switch Transformer, equations 4 to 6): a scalar.

    `f_e` is the share of tokens that chose expert e, `p_e` its mean routing probability. `router_scores` holds one
    (B, S, 2, n) tensor a layer; `attention_mask` (B, S) leaves padding out.

    The softmax over all n² sums is the outer product of the softmaxes of the two lists, so the mean probabilities are
    one (n, N) by (N, n) product and no tensor of N·E exists.
    """
    scores = torch.stack(list(router_scores)).flatten(0, 2)  # (N, 2, n)
    keys = scores.shape[-1]
    weight = scores.new_ones(scores.shape[0])
    if attention_mask is not None:
        weight = attention_mask.to(scores.dtype).flatten().repeat(len(router_scores))
    first, second = scores.softmax(-1).unbind(1)
    probability = (first * weight[:, None]).T @ second / weight.sum()  # (n, n)

    best, index = scores.topk(min(top_k, keys), dim=-1)
    sums = einx.add("t i, t j -> t (i j)", best[:, 0], best[:, 1])
    pairs = sums.topk(top_k, dim=-1).indices
    width = best.shape[-1]
    experts = index[:, 0].gather(-1, pairs // width) * keys + index[:, 1].gather(-1, pairs % width)
    chosen = scores.new_zeros(keys * keys).scatter_add(0, experts.flatten(), weight.repeat_interleave(top_k))
    return keys * keys * (chosen / weight.sum() * probability.flatten()).sum() / top_k
