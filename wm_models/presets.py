"""The sizes that the papers and the small-doge models use, by name."""

from typing import Any

import torch

from wm_models.cheems import CheemsForCausalLM
from wm_models.configuration import CheemsConfig, DogeConfig
from wm_models.doge import DogeForCausalLM

# The class of a language model, by that of its configuration
MODELS: dict[type, Any] = {DogeConfig: DogeForCausalLM, CheemsConfig: CheemsForCausalLM}
# size: hidden size, intermediate size, layers, query heads, key/value heads, experts, experts a token.
# The gate router has one head, so experts a token are the product-key router's heads times experts a head.
_SIZES = {
    "20m": (256, 512, 8, 2, 1, 0, 0),
    "60m": (512, 1024, 16, 4, 2, 0, 0),
    "160m": (768, 1536, 24, 6, 3, 0, 0),
    "320m": (1024, 2048, 32, 8, 4, 0, 0),
    "20m-moe": (256, 512, 8, 2, 1, 1024, 1 * 2),
    "120m-moe": (512, 1024, 16, 4, 2, 4096, 2 * 4),
    "480m-moe": (768, 1536, 24, 6, 3, 9216, 3 * 6),
    "1.4b-moe": (1024, 2048, 32, 8, 4, 16384, 4 * 8),
}
# Doge alone, with a tokenizer of 128256 ids that does not ship (small-doge, recipes/doge).
_LARGE_VOCABULARY = {
    "40m-moe": (256, 768, 8, 2, 1, 1024, 8),
    "100m": (512, 1536, 16, 4, 2, 0, 0),
    "180m-moe": (512, 1536, 16, 4, 2, 4096, 16),
    "260m": (768, 2304, 24, 6, 3, 0, 0),
    "600m-moe": (768, 2304, 24, 6, 3, 9216, 24),
    "1.6b-moe": (1024, 4096, 32, 8, 4, 16384, 32),
}
_TOKENS = {"vocab_size": 32768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LARGE_TOKENS = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128001}
_LENGTH = {"max_position_embeddings": 2048}
_LONG = {"doge-1.6b-moe": {"max_position_embeddings": 4096, "keep_window_size": 4096, "rope_theta": 40000.0}}

PRESETS = tuple([f"doge-{size}" for size in (*_SIZES, *_LARGE_VOCABULARY)] + [f"cheems-{size}" for size in _SIZES])


def preset(name: str) -> DogeConfig:
    """The preset's configuration. Raises ValueError for a name not in `PRESETS`."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset; expected one of {', '.join(PRESETS)}")
    model, size = name.split("-", 1)
    hidden, inner, layers, heads, narrow, experts, per_token = (_SIZES | _LARGE_VOCABULARY)[size]
    fields: dict[str, Any] = {"is_moe": True, "num_experts": experts, "num_experts_per_tok": per_token}
    return (CheemsConfig if model == "cheems" else DogeConfig)(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=narrow,
        tie_word_embeddings=True,
        **(_LARGE_TOKENS if size in _LARGE_VOCABULARY else _TOKENS),
        **(_LENGTH | _LONG.get(name, {})),
        **(fields if experts else {}),
    )


def has_tokenizer(name: str) -> bool:
    """Whether the tokenizer that ships is the one of the preset `name`."""
    return preset(name).vocab_size == _TOKENS["vocab_size"]


def create(name: str, seed: int = 0) -> DogeForCausalLM | CheemsForCausalLM:
    """The preset's model with random weights from `seed`, in evaluation mode; torch's own generator is left alone."""
    config = preset(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[type(config)](config)
    return model.eval()
