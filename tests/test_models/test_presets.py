"""Presets and the shipped tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wm_models import PRESETS, CheemsForCausalLM, DogeForCausalLM, create, preset, shipped_tokenizer

# hidden, intermediate, layers, key/value width, key/value heads, experts: from the table of the models' description
TABLE = {
    "20m": (256, 512, 8, 128, 1, 0),
    "60m": (512, 1024, 16, 256, 2, 0),
    "160m": (768, 1536, 24, 384, 3, 0),
    "320m": (1024, 2048, 32, 512, 4, 0),
    "20m-moe": (256, 512, 8, 128, 1, 1024),
    "120m-moe": (512, 1024, 16, 256, 2, 4096),
    "480m-moe": (768, 1536, 24, 384, 3, 9216),
    "1.4b-moe": (1024, 2048, 32, 512, 4, 16384),
}
# of small-doge's recipes, with 128256 ids
LARGE_VOCABULARY = {
    "40m-moe": (256, 768, 8, 128, 1, 1024),
    "100m": (512, 1536, 16, 256, 2, 0),
    "180m-moe": (512, 1536, 16, 256, 2, 4096),
    "260m": (768, 2304, 24, 384, 3, 0),
    "600m-moe": (768, 2304, 24, 384, 3, 9216),
    "1.6b-moe": (1024, 4096, 32, 512, 4, 16384),
}


def test_names():
    expected = {f"{model}-{size}" for model in ("doge", "cheems") for size in TABLE}
    assert set(PRESETS) == expected | {f"doge-{size}" for size in LARGE_VOCABULARY}
    with pytest.raises(ValueError, match="doge-20m"):
        preset("doge-21m")


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name):
    kind, size = name.split("-", 1)
    d, i, layers, kv, k, e = (TABLE | LARGE_VOCABULARY)[size]
    tokens = 128256 if size in LARGE_VOCABULARY else 32768
    heads = d // 128
    with torch.device("meta"):
        model = (DogeForCausalLM if kind == "doge" else CheemsForCausalLM)(preset(name))
    attention = 2 * d * d + 2 * d * kv
    experts = 2 * e * d + 2 * round(e**0.5) * d
    if kind == "doge":
        mixers = layers * (attention + kv * k + k + 2 * 128)
    else:
        mixers = layers // 8 * (attention + kv * heads + heads)
        mixers += (layers - layers // 8) * (4 * d * d + d * heads + heads)
    assert sum(p.numel() for p in model.parameters()) == tokens * d + d + mixers + layers * (
        3 * d * i + experts + 4 * d
    )


def test_seeds():
    before = torch.get_rng_state()
    first, again, other = create("doge-20m", 1), create("doge-20m", 1), create("doge-20m", 2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tokenizer():
    tokenizer = shipped_tokenizer()
    assert len(tokenizer) == 32768
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert len(tokenizer("import numpy as np\n\ndef main():\n    return None\n").input_ids) < 20


TOKENIZER = shipped_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids) == text
