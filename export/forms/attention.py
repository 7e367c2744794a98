"""Dynamic mask attention for ONNX: one product for query, key and value, and no factor for the scores.

B batch, S new tokens, D hidden size, H query heads, K key/value heads, d head size, Hm rows of the bias.
"""

import torch
from torch import nn
from torch.nn import functional as F

from export.forms.options import FormOptions
from export.forms.projection import HeadProjection, fixed, fold_scale
from wm_models.layers.attention import DMAttention, KeyBias, compose


class AttentionProjection(HeadProjection):
    """Query, key and value as one product, and dt as another, over x.

    dt is linear in the value and the value in x, so dt's weight on x is the product of two weights, taken in float64.
    Each of its rows is there `repeat` times. With `exact` it stays float64, as in `DMAttention.project_dt`. Else it is
    float32, in narrow models too: the bias grows exponentially with dt, and the rounding of dt to bfloat16 changes a
    large bias by more than 1.
    """

    def __init__(self, attention: DMAttention, repeat: int, exact: bool):
        super().__init__((attention.q_proj, attention.k_proj, attention.v_proj), attention.head_size)
        weight, bias = compose(attention.v_proj, attention.dt_proj)
        dtype = torch.float64 if exact else torch.float32
        self.dt_weight = fixed(weight.repeat_interleave(repeat, 0).to(dtype))
        self.dt_bias = None if bias is None else fixed(bias.repeat_interleave(repeat).to(dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *super().forward(x), F.linear(x.to(self.dt_weight.dtype), self.dt_weight, self.dt_bias)


class RoundedBias(KeyBias):
    """`KeyBias` in float32, rounded to the model's dtype at the end alone."""

    def __init__(self, dtype: torch.dtype):
        super().__init__(selects=False)
        self.dtype = dtype

    def forward(self, dt: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """dt (B, S, Hm), A (Hm), both float32 -> (B, Hm, S), in the model's dtype."""
        return super().forward(dt, A).to(self.dtype)


class PowerBias(KeyBias):
    """`KeyBias` in float64, as (1 + exp(dt)) ** A: ONNX Runtime has no Softplus of that."""

    def forward(self, dt: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """dt (B, S, Hm), A (Hm), both float64 -> (B, Hm, S), float32."""
        return torch.pow(1.0 + torch.exp(dt), A).float().transpose(1, 2)


class AttentionForm(DMAttention):
    """`DMAttention` with its projections side by side and its scale in the weights of the query.

    ONNX Runtime has a kernel for the product of one query with its keys that takes no factor: a fifth of attention's
    time in a decode step. Unless rows of the caches are evicted, the bias is there for every query head: a row of the
    mask is then a row of the bias cache.
    """

    def __init__(self, attention: DMAttention, options: FormOptions):
        nn.Module.__init__(self)  # not DMAttention's: nothing is drawn, and the parameters are the layer's own
        self.layer, self.head_size = attention.layer, attention.head_size
        self.key_value_heads = attention.key_value_heads
        self.q_norm, self.k_norm, self.o_proj = attention.q_norm, attention.k_norm, attention.o_proj
        self.selects = options.selects
        self.key_bias = PowerBias(selects=True) if options.selects else RoundedBias(attention.A.dtype)
        self.scale = 1.0
        with torch.no_grad():
            fold_scale(attention)
            heads, rows = attention.q_proj.out_features // self.head_size, attention.A.shape[0]
            repeat = 1 if options.evicts else heads // rows
            self.fused = AttentionProjection(attention, repeat, options.selects)
            self.A = fixed(attention.A.repeat_interleave(repeat).to(self.fused.dt_weight.dtype))

    @property
    def cached_like(self) -> torch.Tensor:
        """Of the model's dtype, which is not A's where the bias is computed in a wider one."""
        return self.fused.weight

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.fused(x)
