"""A mixture of experts for ONNX, which has no product with rows that are chosen by an index.

N tokens, D hidden size, E experts, h router heads, k experts a head.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from export.forms.options import FormOptions
from wm_models.layers.experts import ExpertMixture


class GatheredMixture(nn.Module):
    """`ExpertMixture` with the chosen experts' rows gathered, then multiplied."""

    def __init__(self, mixture: ExpertMixture, options: FormOptions):
        super().__init__()

    def forward(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """As `ExpertMixture`: x (N, D), experts and weights (N, h·k), down and up (E, D) -> (N, D)."""
        strength = act_fn((F.embedding(experts, down) @ x[..., None])[..., 0]) * weights
        return (strength[:, None] @ F.embedding(experts, up))[:, 0]
