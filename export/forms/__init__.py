"""The ONNX forms of layers: modules that compute the same with operators that ONNX and its compilers have.

eager layer      form             what it changes
DMAttention      AttentionForm    one product for query, key and value; the scale is in its weights
SSDMixer         SSDForm          one product for c, b and x; the recurrence or chunks, chosen by an If
ExpertMixture    GatheredMixture  the chosen rows are gathered, then multiplied
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import nn

from export.forms.attention import AttentionForm
from export.forms.experts import GatheredMixture
from export.forms.options import FormOptions
from export.forms.ssd import SSDForm
from wm_models.layers.attention import DMAttention
from wm_models.layers.experts import ExpertMixture
from wm_models.layers.ssd import SSDMixer

Forms: TypeAlias = Mapping[type[nn.Module], Callable[..., nn.Module]]

# A layer of exactly this class is replaced by what the form makes of it; any other is lowered as it is.
FORMS: Forms = {
    DMAttention: AttentionForm,
    SSDMixer: SSDForm,
    ExpertMixture: GatheredMixture,
}

__all__ = ["FORMS", "FormOptions", "replace_layers"]


def replace_layers(model: nn.Module, options: FormOptions, forms: Forms = FORMS) -> None:
    """Put the form of each layer that has one into its place. The forms take over the layers' parameters."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            form = forms.get(type(layer))
            if form is not None:
                setattr(parent, name, form(layer, options))
