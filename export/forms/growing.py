"""Attention over caches that grow: each key's bias is computed from the value cache, so only keys and values are kept.

B batch, S new tokens, L keys seen, D hidden size, H query heads, K key/value heads, d head size, Hm rows of the bias.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from export.forms.options import FormOptions
from export.forms.projection import HeadProjection, fixed, fold_scale
from wm_models.layers.attention import DMAttention


class GrowingCaches(Protocol):
    """What the form asks of the pass that it is part of."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, heads, S, d) turned to the positions of the new tokens."""
        ...

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (B, K, L, d) of a layer: those of its caches, and the new ones (B, K, S, d)."""
        ...

    def attend_all(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Attention of query (B, H, S, d) over all keys, whose biases (B, H, L) are added: (B, H, S, d)."""
        ...


class GrowingAttention(nn.Module):
    """`DMAttention` without a bias cache; the scale of the scores is in the weights of the query.

    A bias is there for every query head. dt is the sum of one product a key/value head with the cache as it lies.
    """

    def __init__(self, attention: DMAttention, options: FormOptions):
        super().__init__()
        self.layer = attention.layer
        self.q_norm, self.k_norm, self.o_proj = attention.q_norm, attention.k_norm, attention.o_proj
        with torch.no_grad():
            fold_scale(attention)
            self.fused = HeadProjection((attention.q_proj, attention.k_proj, attention.v_proj), attention.head_size)
            heads, narrow = self.fused.heads[:2]
            dt, repeat = attention.dt_proj, heads // attention.A.shape[0]
            dtype = torch.float32 if options.selects else attention.A.dtype  # of biases that keys are selected by
            rows = dt.weight.repeat_interleave(repeat, 0).to(dtype)  # (H, K·d)
            self.dt_weight = fixed(rows.T.reshape(narrow, attention.head_size, heads).contiguous())  # (K, d, H)
            self.dt_bias = None if dt.bias is None else fixed(dt.bias.repeat_interleave(repeat).to(dtype))
            self.A = fixed(attention.A.repeat_interleave(repeat).to(dtype))

    def forward(self, x: torch.Tensor, context: GrowingCaches) -> torch.Tensor:
        query, key, value = self.fused(x)
        query, key = context.rotate(self.q_norm(query)), context.rotate(self.k_norm(key))
        key, value = context.extend(self.layer, key, value)
        parts = value.to(self.dt_weight.dtype) @ self.dt_weight  # (B, K, L, H)
        dt = parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]
        if self.dt_bias is not None:
            dt = dt + self.dt_bias
        bias = torch.exp(self.A * F.softplus(dt)).transpose(1, 2)
        y = context.attend_all(query, key, value, bias)
        return self.o_proj(y.transpose(1, 2).flatten(2))
