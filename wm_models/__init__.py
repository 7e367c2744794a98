"""Doge, the language model of the "Wonderful Matrices" paper (arXiv 2412.11834), written for compilers."""

from .checkpoint import CheckpointError
from .configuration import DogeConfig
from .doge import DogeForCausalLM, DogeForSequenceClassification, DogeModel
from .modules import CDMoE, DMAttn
from .passes import LayerCache
from .presets import PRESETS, create, preset
from .tokenizer import shipped_tokenizer

__all__ = [
    "PRESETS",
    "CDMoE",
    "CheckpointError",
    "DMAttn",
    "DogeConfig",
    "DogeForCausalLM",
    "DogeForSequenceClassification",
    "DogeModel",
    "LayerCache",
    "create",
    "preset",
    "shipped_tokenizer",
]
