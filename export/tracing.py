"""A model as a torch module becomes an ONNX graph: the exporter traces a few layers, and the others are copies.

Tracing a layer takes a second, and copying it milliseconds. The first layer of a kind may also compute what all of them
share, so copies are made of the second.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset24 as op
from torch import nn

from export.forms import FORMS, FormOptions, Forms, replace_layers
from export.rewrites.names import name_by_module
from export.rewrites.repeated_layers import repeat_layers
from export.rewrites.sizes import read_sizes_of_first_inputs
from wm_models.decoder import DecoderWithHead

PLAIN = bool, int, float, str, list, tuple, torch.dtype, torch.Size, type(None)
LAYER = "layer"  # the attribute in which a layer's modules keep its number


class TracedModel(nn.Module):
    """A model whose layers are replaced by their forms, and which has only the layers that the exporter traces.

    `tensors` puts the other layers back. The model is used up. `originals`: for each of its layers the number of the
    one that it is lowered as. `traced`: the numbers of the layers that it still has. Names keep these numbers; the
    modules' own numbers, which index the caches, become 0, 1, 2 and so on.
    """

    def __init__(self, model: DecoderWithHead, options: FormOptions, forms: Forms = FORMS):
        super().__init__()
        replace_layers(model, options, forms)
        layers: Any = model.model.layers
        self.model, self.every, self.originals = model, list(layers), find_originals(layers)
        self.traced = sorted(set(self.originals))
        model.model.layers = nn.ModuleList()
        for place, number in enumerate(self.traced):
            model.model.layers.add_module(str(number), self.every[number])
            for module in self.every[number].modules():
                if LAYER in vars(module):
                    setattr(module, LAYER, place)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer of the whole model, by name: the layers that were not traced are back."""
        self.model.model.layers = nn.ModuleList(self.every)
        return dict([*self.named_parameters(remove_duplicate=False), *self.named_buffers()])


def find_originals(layers: Sequence[nn.Module]) -> list[int]:
    """For each layer the number of the one that it is lowered as: its own where it is the first or second of a kind."""
    kinds = [_kind(layer) for layer in layers]
    found: list[int] = []
    for number, kind in enumerate(kinds):
        alike = [earlier for earlier in range(number) if kinds[earlier] == kind]
        found.append(alike[1] if len(alike) > 1 else number)
    return found


def _kind(layer: nn.Module) -> list[Any]:
    """What decides which nodes a layer becomes: all but its number, and the values of its parameters.

    An object of its own, which may be anything, makes a layer unlike all others.
    """
    return [
        (
            name,
            type(module),
            {
                key: repr(value) if isinstance(value, PLAIN) else id(value)
                for key, value in vars(module).items()
                if not key.startswith("_") and key != LAYER
            },
            [(key, value.shape, value.dtype) for key, value in module.named_parameters(recurse=False)],
            [(key, value.shape, value.dtype) for key, value in module.named_buffers(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def trace(
    graph: TracedModel,
    sample: tuple[torch.Tensor, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> ir.Model:
    """The ONNX graph that `graph` becomes for inputs like `sample`, named by its modules; as `torch.onnx.export`.

    The states of the layers are its last inputs and outputs, in their order and with their numbers in the names. Those
    of layers that are not traced are left out here.
    """
    # The exporter speaks of names of dimensions that it unifies, and of a torchvision that nobody here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Keys of the cache of fake tensors have every symbolic size in them: they cost more than what they save.
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with warnings.catch_warnings(), torch.no_grad(), uncached:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            sample,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table={torch.ops.aten.softplus.default: _softplus},
            optimize=False,
            verbose=False,
        )
        assert program is not None
        read_sizes_of_first_inputs(program.model.graph)
        repeat_layers(program.model.graph, graph.originals, graph.tensors())
        program.optimize()
    name_by_module(program.model)
    return program.model


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """One node: ONNX's Softplus needs no threshold to stay finite, so torch's Greater and Where go."""
    assert beta == 1.0
    return op.Softplus(x)
