"""Linear layers over one input as one product, and attention's scale in the weights.

B batch, S new tokens, D hidden size, d head size.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from wm_models.layers.attention import DMAttention


class HeadProjection(nn.Module):
    """Linear layers over one input as one product, whose heads are put before the tokens once for all layers.

    x (B, S, D) -> (B, heads, S, d) of each layer.
    """

    def __init__(self, parts: Sequence[nn.Linear], head_size: int):
        super().__init__()
        self.head_size = head_size
        self.heads = [part.out_features // head_size for part in parts]
        self.weight = fixed(torch.cat([part.weight for part in parts]))
        biased = parts[0].bias is not None
        self.bias = fixed(torch.cat([part.bias for part in parts])) if biased else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = F.linear(x, self.weight, self.bias).view(*x.shape[:2], -1, self.head_size).transpose(1, 2)
        return heads.split(self.heads, dim=1)


def fixed(value: torch.Tensor) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(value, requires_grad=False)


def fold_scale(attention: DMAttention) -> None:
    """Multiply the weights that the query comes from by the scale of the scores, in float64 and in place."""
    norm = attention.q_norm
    for weight in [norm.weight] if isinstance(norm, nn.RMSNorm) else attention.q_proj.parameters():
        weight.copy_(weight.double() * attention.scale)
