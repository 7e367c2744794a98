"""Layers that are copies of traced ones: the graph is the one that the exporter makes of all layers."""

from typing import Any

import onnx_ir as ir
import pytest
from conftest import SMALL, baseline, ours, randomise

from export import tracing
from export.lower import lower
from export.lower_growing import lower_growing
from export.tracing import find_originals
from wm_models import CheemsConfig, CheemsForCausalLM


def attention():
    return ours(baseline(keep_window_size=40, num_hidden_layers=4), expert_routing="token")


def hybrid():
    """Three recurrent layers, with branches and constants of their own, before one of attention."""
    kinds = {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 3, "ssd_chunk_size": 16}
    experts = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5}
    model = CheemsForCausalLM(CheemsConfig(**SMALL | kinds | experts)).eval()
    randomise(model)
    return model


def step(model):
    return lower(model, max_batch=4, max_length=256, all_logits=False)


def growing(model):
    return lower_growing(model, max_length=256)


@pytest.mark.parametrize(("make", "lowered"), [(attention, step), (hybrid, step), (attention, growing)])
def test_the_graph_of_all_layers(make, lowered, monkeypatch):
    """Byte for byte, weights included; the copy lies between layers that are traced."""
    found = []
    for originals in [0, 1, 1, 3], [0, 1, 2, 3]:
        monkeypatch.setattr(tracing, "find_originals", lambda _, originals=originals: originals)
        found.append(ir.to_proto(lowered(make())).SerializeToString(deterministic=True))
    equal = found[0] == found[1]  # pytest would look for the difference
    assert equal


def test_which_layers_are_alike():
    """A number, a type or an object of its own tells layers apart; the layer's number and its weights do not."""
    layers: Any = ours(baseline(num_hidden_layers=5), expert_routing="token").model.layers
    assert find_originals(layers) == [0, 1, 1, 1, 1]
    layers[1].input_layernorm.eps *= 2
    assert find_originals(layers) == [0, 1, 2, 2, 2]
    layers[3].mlp.own = object()
    assert find_originals(layers) == [0, 1, 2, 3, 2]
    config = CheemsConfig(**SMALL | {"num_hidden_layers": 7}, attn_layer_period=3, attn_layer_offset=1)
    assert find_originals(CheemsForCausalLM(config).model.layers) == [0, 1, 2, 2, 4, 2, 2]
