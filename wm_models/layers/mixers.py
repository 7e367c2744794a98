"""Sequence mixers: what a hybrid model's layers hold where they hold no attention, entered in the registry `MIXERS`.

A config names its mixer with `sequence_mixer`. The name is also the module's in the layer, and so a part of the names
of its tensors: `layers.N.ssd.…`.

B batch (slots), S new tokens, C cache capacity, D hidden size.
"""

from typing import Protocol

import torch

from wm_models.configuration import MIXERS
from wm_models.layers.context import Context, LayerCache
from wm_models.layers.ssd import SSDMixer


class Mixer(Protocol):
    """A module that mixes the tokens of a sequence, built from a config and the layer's number.

    It may have `start_values`, see `DecoderPreTrainedModel._init_weights`.
    """

    def __call__(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); `context` has the positions and the layer's cache."""
        ...

    def new_cache(self, batch: int, capacity: int) -> LayerCache:
        """An empty static cache of `batch` slots, on the weights' device; only attention's grows with `capacity`."""
        ...


# Each is a class whose instances are `Mixer`s, and whose `cache_type` is the NamedTuple of a layer's state.
MIXERS["ssd"] = SSDMixer
