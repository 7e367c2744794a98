"""Doge and Cheems, the language models of the "Wonderful Matrices" paper (arXiv 2412.11834), written for compilers."""

import logging
from importlib.metadata import version

from wm_models.checkpoint.errors import CheckpointError
from wm_models.checkpoint.formats import FORMATS, Format
from wm_models.cheems import CheemsForCausalLM, CheemsModel
from wm_models.configuration import MIXERS, CheemsConfig, DogeConfig
from wm_models.doge import DogeForCausalLM, DogeForSequenceClassification, DogeModel
from wm_models.layers.context import LayerCache
from wm_models.layers.ssd import SSD
from wm_models.paper import CDMoE, DMAttn
from wm_models.presets import PRESETS, create, preset
from wm_models.shipped import shipped_checkpoint, shipped_tokenizer

__version__ = version("wm-models")

__all__ = [
    "FORMATS",
    "MIXERS",
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
    "Format",
    "LayerCache",
    "__version__",
    "create",
    "preset",
    "shipped_checkpoint",
    "shipped_tokenizer",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the application wants to hear
