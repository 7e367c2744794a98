"""The losses: cross entropy of the language-model head, and the router's load balance.

B batch, S tokens, D hidden size, V vocabulary, E experts, n = sqrt(E), h router heads, k experts a head,
N tokens (of the load balance: layers · B · S · h), c tokens of a chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from wm_models.layers.experts import best_pairs, staircase

IGNORED = -100
CHUNK_LOGITS = 2**23
MOST_CHUNKS = 16


def count_predictions(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens `labels` (B, S) have predicted: a scalar."""
    return (labels[:, 1:] != IGNORED).sum()


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token under `hidden @ head.T`, in float32: a scalar.

    hidden (B, S, D); head (V, D); labels (B, S) int64, of which position s predicts s + 1, `IGNORED` where there is
    none. Zero where nothing is predicted.

    The logits exist for one chunk of tokens at a time, and the gradients are made from them there and then: nothing is
    computed twice, and memory does not grow with B · S · V.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    train = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    total = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head, targets, train)
    return total / count_predictions(labels).clamp(min=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies; hidden (N, D), head (V, D), targets (N)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, train: bool) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows, matrix = hidden.to(dtype), head.to(dtype)
        vocabulary = torch.arange(head.shape[0], device=hidden.device)
        total = torch.zeros((), device=hidden.device)
        grad_hidden, grad_head = [], torch.zeros_like(head, dtype=torch.float32)
        size = max(CHUNK_LOGITS // head.shape[0], -(-hidden.shape[0] // MOST_CHUNKS))
        for start in range(0, hidden.shape[0], size):
            row, target = rows[start : start + size], targets[start : start + size, None]  # (c, D), (c, 1)
            logits = (row @ matrix.T).float()  # (c, V)
            normaliser, real = logits.logsumexp(-1, keepdim=True), target != IGNORED
            right = logits.gather(-1, target.clamp(min=0))
            total = total + torch.where(real, normaliser - right, 0).sum()
            if train:
                gradient = torch.where(real, (logits - normaliser).exp() - (vocabulary == target).float(), 0).to(dtype)
                grad_hidden.append(gradient @ matrix)
                grad_head += gradient.T @ row
        if train:
            ctx.save_for_backward(torch.cat(grad_hidden).to(hidden.dtype), grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grads[0] * grad_hidden, grads[0] * grad_head, None, None


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
