"""Rotary positions (RoPE), of every kind that transformers knows.

B batch, S new tokens, d head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from wm_models.configuration import DogeConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, for every `rope_type` of transformers, without a branch on data.

    `default`, `linear`, `yarn` and `llama3` have fixed frequencies. `longrope` has two sets and `dynamic` (NTK) a base
    that grows with the length: both are tensor arithmetic on each sequence's length.
    """

    frequencies: torch.Tensor
    long_frequencies: torch.Tensor

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.config = config
        rope = config.rope
        self.kind: str = rope["rope_type"]
        self.original_length: int = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if self.kind == "dynamic":
            self.original_length = config.max_position_embeddings
        self.scaling = 1.0 if self.kind == "default" else self._scaled()[1]
        for name, value in self.start_values().items():
            self.register_buffer(name, value, persistent=False)

    def start_values(self) -> dict[str, torch.Tensor]:
        """The buffers' values, on the CPU: they are in no checkpoint, so loading asks for them again."""
        if self.kind == "default":
            size, theta = self.config.head_size, self.config.rope["rope_theta"]
            return {"frequencies": 1.0 / theta ** (torch.arange(0, size, 2, device="cpu").float() / size)}
        constants = {"frequencies": self._scaled()[0]}
        if self.kind == "longrope":
            constants["long_frequencies"] = self._scaled(seq_len=self.original_length + 1)[0]
        return constants

    def _scaled(self, **kwargs: int) -> tuple[torch.Tensor, float]:
        with torch.device("cpu"):  # whatever device the model is being built on, these are real numbers
            return ROPE_INIT_FUNCTIONS[self.kind](self.config, torch.device("cpu"), **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follow the model to another device, but stay float32: a position times a rounded frequency is far off."""
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in buffers.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 (B, S, d/2) each.

        `positions` (B, S) int64; `lengths` (B) int64, each sequence's highest position so far plus one.
        """
        frequencies = self.frequencies
        if self.kind == "longrope":
            extended = lengths[:, None, None] > self.original_length
            frequencies = torch.where(extended, self.long_frequencies, frequencies)
        elif self.kind == "dynamic":
            rope, size = self.config.rope, self.config.head_size
            ratio = lengths.clamp(min=self.original_length)[:, None, None].float() / self.original_length
            base = rope["rope_theta"] * (rope["factor"] * ratio - (rope["factor"] - 1)) ** (size / (size - 2))
            frequencies = 1.0 / base ** (torch.arange(0, size, 2, device=positions.device).float() / size)
        angles = positions[..., None].float() * frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate each head's halves against each other: x (B, heads, S, d), cosine and sine (B, S, d/2)."""
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
