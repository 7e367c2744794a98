"""Doge and Cheems, the language models of the "Wonderful Matrices" paper (arXiv 2412.11834), written for compilers."""

from .checkpoint import CheckpointError
from .cheems import CheemsForCausalLM, CheemsModel
from .configuration import CheemsConfig, DogeConfig
from .doge import DogeForCausalLM, DogeForSequenceClassification, DogeModel
from .modules import CDMoE, DMAttn
from .passes import LayerCache
from .presets import PRESETS, create, preset
from .shipped import shipped_checkpoint, shipped_tokenizer
from .ssd import SSD

__all__ = [
    "PRESETS",
    "SSD",
    "CDMoE",
    "CheckpointError",
    "CheemsConfig",
    "CheemsForCausalLM",
    "CheemsModel",
    "DMAttn",
    "DogeConfig",
    "DogeForCausalLM",
    "DogeForSequenceClassification",
    "DogeModel",
    "LayerCache",
    "create",
    "preset",
    "shipped_checkpoint",
    "shipped_tokenizer",
]
