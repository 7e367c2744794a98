"""Every RoPE of transformers: the same rotations at every length, within one compiled graph."""

import pytest
import torch
from conftest import SMALL
from transformers.models.doge import modeling_doge

from wm_models import DogeConfig
from wm_models.layers.rotary import RotaryEmbedding, rotate

HALF = SMALL["hidden_size"] // SMALL["num_attention_heads"] // 2
KINDS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)], "long_factor": [2.0 + i for i in range(HALF)],
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
}  # fmt: skip
LENGTHS = (1, 2, 64, 127, 128, 129, 130, 200, 256, 511, 512)  # the original maximum is 128


def config(kind):
    maximum = 512 if "original_max_position_embeddings" in KINDS[kind] else 128
    rope = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    return DogeConfig(**{**SMALL, "max_position_embeddings": maximum, "rope_parameters": rope})


def theirs(kind, x, positions):
    """Rotated by a module that has seen no other length: transformers' own keeps frequencies of the longest."""
    cosine, sine = modeling_doge.DogeRotaryEmbedding(config(kind))(x, positions)
    return modeling_doge.apply_rotary_pos_emb(x, x, cosine, sine)[0]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_every_length_in_one_graph(kind):
    rotary = RotaryEmbedding(config(kind))

    def turn(x, positions, lengths):
        return rotate(x, *rotary(positions, lengths))

    torch._dynamo.reset()
    compiled = torch.compile(turn, fullgraph=True)
    x = torch.randn(2, 4, 5, 2 * HALF, generator=torch.Generator().manual_seed(0))
    for index, length in enumerate(LENGTHS):
        positions = torch.arange(length - 5, length).clamp(min=0).expand(2, -1)
        expected = theirs(kind, x, positions)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = compiled(x, positions, torch.full((2,), length))
        # two float32 frequencies may differ in their last bit, and an angle is that many times its position
        limit = 2e-5 + length * 2**-23 * x.abs().max().item()
        for rotated in (found, turn(x, positions, torch.full((2,), length))):
            torch.testing.assert_close(rotated, expected, rtol=0, atol=limit)


def test_each_sequence_has_its_own_length(kind):
    rotary = RotaryEmbedding(config(kind))
    lengths, x = torch.tensor([50, 129, 400]), torch.randn(3, 4, 5, 2 * HALF)
    positions = lengths[:, None] - 5 + torch.arange(5)
    found = rotate(x, *rotary(positions, lengths))
    for row in range(3):
        expected = theirs(kind, x[row : row + 1], positions[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=2e-5)


def test_lengths_differ_where_they_should():
    """The comparison could tell: beyond the original maximum these kinds turn otherwise than below it."""
    positions = torch.tensor([[3]])
    for kind in ("dynamic", "longrope"):
        rotary = RotaryEmbedding(config(kind))
        below, above = rotary(positions, torch.tensor([128])), rotary(positions, torch.tensor([129]))
        assert (below[0] - above[0]).abs().max() > 1e-6
