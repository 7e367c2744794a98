"""Cheems (paper, section 4): a hybrid decoder of state space duality, with one layer of attention in a period.

Its other layers hold the sequence mixer that the config names in `layers/mixers.py`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from wm_models.configuration import MIXERS, CheemsConfig
from wm_models.decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, DecoderPreTrainedModel
from wm_models.layers.attention import DMAttention
from wm_models.layers.mixers import Mixer

logger = logging.get_logger(__name__)


class CheemsDecoderLayer(DecoderLayer):
    """A layer of attention, `self_attn`, or of the config's mixer, under that one's name."""

    def __init__(self, config: CheemsConfig, layer: int):
        super().__init__(config)
        attention = config.layer_types[layer] == "full_attention"
        self.mixer_name = "self_attn" if attention else config.sequence_mixer
        mixer_class = DMAttention if attention else MIXERS[config.sequence_mixer]
        self.add_module(self.mixer_name, mixer_class(config, layer))

    @property
    def mixer(self) -> Mixer:
        return getattr(self, self.mixer_name)


class CheemsPreTrainedModel(DecoderPreTrainedModel):
    config_class = CheemsConfig
    _no_split_modules = ["CheemsDecoderLayer"]


class CheemsModel(CheemsPreTrainedModel, DecoderModel):
    """Token ids to hidden states. A token at position 0 begins a sequence: SSD states are cleared before it."""

    layer_class = CheemsDecoderLayer

    def __init__(self, config: CheemsConfig):
        super().__init__(config)
        attention = config.layer_types.count("full_attention")
        if attention in (0, config.num_hidden_layers):
            logger.warning(
                f"attn_layer_period {config.attn_layer_period} and attn_layer_offset {config.attn_layer_offset} make "
                f"all {config.num_hidden_layers} layers {'attention' if attention else config.sequence_mixer}"
            )


class CheemsForCausalLM(CheemsPreTrainedModel, DecoderForCausalLM):
    """Cheems with its language-model head."""

    model_class = CheemsModel


AutoConfig.register(CheemsConfig.model_type, CheemsConfig)
AutoModel.register(CheemsConfig, CheemsModel)
AutoModelForCausalLM.register(CheemsConfig, CheemsForCausalLM)
