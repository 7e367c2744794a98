"""A sequence mixer from outside the packages: a gated exponential moving average over every channel.

    h_t = a ⊙ h_{t-1} + (1 - a) ⊙ sigmoid(gate(x_t)) ⊙ x_t        zeros before the first token
    y_t = out(h_t)

Its state is (B, D): neither attention's, which grows, nor SSD's. To import this file is to register it.

B batch (slots), S new tokens, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from wm_models import MIXERS, CheemsConfig
from wm_models.layers.context import Context
from wm_models.layers.ssd import CLEARED, decays


class Average(NamedTuple):
    """The layer's static cache."""

    average: torch.Tensor  # (B, D), in the weights' dtype


class MovingAverage(nn.Module):
    """(B, S, D) -> (B, S, D)."""

    cache_type = Average

    def __init__(self, config: CheemsConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.decay = nn.Parameter(torch.zeros(config.hidden_size))  # a = sigmoid(decay)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def start_values(self) -> dict[str, torch.Tensor]:
        """Decays from 0.5 to 0.98, spread over the channels."""
        return {"decay": torch.linspace(0, 4, self.decay.shape[0])}

    def new_cache(self, batch: int, capacity: int) -> Average:
        return Average(self.decay.new_zeros(batch, self.decay.shape[0]))

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        added = torch.sigmoid(self.gate_proj(x)) * x * torch.sigmoid(-self.decay)

        def advance(
            state: Average | None, real: torch.Tensor | None, first: torch.Tensor
        ) -> tuple[torch.Tensor, Average]:
            """All tokens at once: the decays between each two, (B, D, S, S), times what each token adds."""
            new = added if real is None else added * real.mT
            decay = F.logsigmoid(self.decay)[:, None].expand(x.shape[0], -1, x.shape[1])
            decay = decay if real is None else decay * real
            decay = torch.where(first, CLEARED, decay)
            y = (decays(decay) @ new.mT[..., None])[..., 0]
            if state is not None:
                y = y + decay.cumsum(-1).exp() * state.average[..., None]
            return y.mT, Average(y[..., -1])

        return self.out_proj(context.carry(self.layer, Average, advance))


MIXERS["average"] = MovingAverage
