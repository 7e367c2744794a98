"""The gated MLP.

B batch, S new tokens, D hidden size.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from wm_models.configuration import DogeConfig


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output (B, S, D), and no router scores."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), None
