"""Doge (paper, section 4): a decoder of dynamic mask attention and gated MLPs or cross domain mixtures of experts."""

from .attention import DMAttention
from .configuration import DogeConfig
from .decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, DecoderPreTrainedModel


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


class DogeModel(DogePreTrainedModel, DecoderModel):
    """Token ids to hidden states."""

    layer_class = DogeDecoderLayer


class DogeForCausalLM(DogePreTrainedModel, DecoderForCausalLM):
    """Doge with its language-model head."""

    model_class = DogeModel
