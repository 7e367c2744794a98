"""Dynamic mask attention for ONNX: one product for query, key and value, and no factor for the scores.

B batch, S new tokens, D hidden size, H query heads, K key/value heads, d head size, Hm rows of the bias.
"""

import torch
from torch import nn
from torch.nn import functional as F

from export.forms.options import FormOptions
from export.forms.projection import HeadProjection, fixed
from wm_models.layers.attention import DMAttention


class AttentionProjection(HeadProjection):
    """Query, key and value as one product, and dt as another, over x.

    dt is linear in the value and the value in x, so dt's weight on x is the product of two weights, taken in float64.
    Each of its rows is there `repeat` times.
    """

    def __init__(self, attention: DMAttention, repeat: int):
        value, dt = attention.v_proj, attention.dt_proj
        super().__init__((attention.q_proj, attention.k_proj, value), attention.head_size)
        self.dt_weight = fixed((dt.weight.double() @ value.weight.double()).repeat_interleave(repeat, 0), dt.weight)
        self.dt_bias = None
        if dt.bias is not None:
            bias = dt.bias.double() + dt.weight.double() @ value.bias.double()
            self.dt_bias = fixed(bias.repeat_interleave(repeat), dt.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *super().forward(x), F.linear(x, self.dt_weight, self.dt_bias)


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
        self.scale = 1.0
        with torch.no_grad():
            norm = self.q_norm
            scaled = [norm.weight] if isinstance(norm, nn.RMSNorm) else list(attention.q_proj.parameters())
            for weight in scaled:
                weight.copy_(weight.double() * attention.scale)
            heads, rows = attention.q_proj.out_features // self.head_size, attention.A.shape[0]
            repeat = 1 if options.evicts else heads // rows
            self.fused = AttentionProjection(attention, repeat)
            self.A = fixed(attention.A.repeat_interleave(repeat))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.fused(x)
