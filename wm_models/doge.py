"""Doge (paper, section 4): a decoder of dynamic mask attention and gated MLPs or cross domain mixtures of experts."""

import logging
import os
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from wm_models.configuration import DogeConfig
from wm_models.decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, DecoderPreTrainedModel, DecoderWithHead
from wm_models.layers.attention import DMAttention

log = logging.getLogger(__name__)


class DogeDecoderLayer(DecoderLayer):
    def __init__(self, config: DogeConfig, layer: int):
        super().__init__(config)
        self.self_attn = DMAttention(config, layer)

    @property
    def mixer(self) -> DMAttention:
        return self.self_attn


class DogePreTrainedModel(DecoderPreTrainedModel):
    config_class = DogeConfig
    config: DogeConfig
    _no_split_modules = ["DogeDecoderLayer"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, in the layout of transformers' own Doge where that can express the config."""
        super().save_pretrained(save_directory, *args, **kwargs)
        beyond = self.config.beyond_transformers
        if beyond:
            log.warning(
                "%s: written as model type %s, for this project alone: transformers' Doge has no %s",
                save_directory, self.config.model_type, ", ".join(beyond),
            )  # fmt: skip


class DogeModel(DogePreTrainedModel, DecoderModel):
    """Token ids to hidden states."""

    layer_class = DogeDecoderLayer


class DogeForCausalLM(DogePreTrainedModel, DecoderForCausalLM):
    """Doge with its language-model head."""

    model_class = DogeModel


class DogeForSequenceClassification(GenericForSequenceClassification, DogePreTrainedModel, DecoderWithHead):
    """Doge with a classifier, `score`, of each sequence's last token that is no padding: logits (B, labels)."""

    score: nn.Linear

    @property
    def head(self) -> nn.Linear:
        return self.score


# `exist_ok`, for transformers has a class of the same name, which stays registered for its own model type.
AutoConfig.register(DogeConfig.model_type, DogeConfig)
AutoModel.register(DogeConfig, DogeModel, exist_ok=True)
AutoModelForCausalLM.register(DogeConfig, DogeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DogeConfig, DogeForSequenceClassification, exist_ok=True)
