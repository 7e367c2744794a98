"""Round each weight to the nearest code.

N rows (output features), K columns (input features).
"""

import torch


def round_to_nearest(weight: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N, K / block) with the largest weight of a block at the largest code."""
    largest = 2 ** (bits - 1) - 1
    blocks = weight.view(weight.shape[0], -1, block)
    scales = blocks.abs().amax(-1).clamp(min=1e-12) / largest
    return (blocks / scales[..., None]).round().clamp(-largest, largest).view_as(weight), scales
