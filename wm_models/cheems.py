"""Cheems (paper, section 4): a hybrid decoder, whose layers are state space duality but for one attention in a period."""

from transformers.utils import logging

from .attention import DMAttention
from .configuration import CheemsConfig
from .decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, DecoderPreTrainedModel
from .ssd import SSDMixer

logger = logging.get_logger(__name__)


class CheemsDecoderLayer(DecoderLayer):
    def __init__(self, config: CheemsConfig, layer: int):
        super().__init__(config)
        if config.layer_types[layer] == "full_attention":
            self.self_attn = DMAttention(config, layer)
        else:
            self.ssd = SSDMixer(config, layer)

    @property
    def mixer(self) -> DMAttention | SSDMixer:
        return self.self_attn if hasattr(self, "self_attn") else self.ssd


class CheemsPreTrainedModel(DecoderPreTrainedModel):
    config_class = CheemsConfig
    config: CheemsConfig
    _no_split_modules = ["CheemsDecoderLayer"]


class CheemsModel(CheemsPreTrainedModel, DecoderModel):
    """Token ids to hidden states. A token at position 0 begins a sequence: SSD states are cleared before it."""

    layer_class = CheemsDecoderLayer

    def __init__(self, config: CheemsConfig):
        super().__init__(config)
        if len(set(config.layer_types)) == 1:
            logger.warning(
                f"attn_layer_period {config.attn_layer_period} and attn_layer_offset {config.attn_layer_offset} make "
                f"all {config.num_hidden_layers} layers {config.layer_types[0]}"
            )


class CheemsForCausalLM(CheemsPreTrainedModel, DecoderForCausalLM):
    """Cheems with its language-model head."""

    model_class = CheemsModel
