"""A graph of a model's first layers grows by the others, which are copies of what those became."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from onnx_ir.traversal import RecursiveGraphIterator

from export.rewrites.initializer import add_initializer
from export.rewrites.names import SCOPES

# A layer's number in the name of a parameter or a state, and in the path of a module.
NUMBER = re.compile(r"((?<=layers\.)|(?<=past_key_values\.)|(?<=present\.))\d+")


def repeat_layers(graph: ir.Graph, originals: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the layers that were not traced between and behind those that were, in place.

    The graph is as the exporter made it: its nodes lie in the order in which the layers ran, and a layer's last node
    makes its output. `originals`: for each layer the number of the one that it is lowered as, the traced ones' own.
    `tensors`: the parameters and buffers of the whole model, by name, in the order that the graph is to have.
    """
    nodes = list(graph)
    found = [_number(node.metadata_props.get(SCOPES)) for node in nodes]
    ends = {number: place for place, number in enumerate(found) if number >= 0}  # of each traced layer the last node
    outputs = {number: nodes[end].outputs[0] for number, end in ends.items()}
    readers = {number: list(output.uses()) for number, output in outputs.items()}
    blocks = {number: nodes[ends[before] + 1 : ends[number] + 1] for before, number in pairwise(ends)}
    inputs: dict[int, ir.Value] = {}
    before, latest = 0, outputs[0]  # the latest traced layer, and the output of the latest layer
    for layer, number in enumerate(originals[1:], 1):
        if layer == number:
            inputs[layer] = latest
            _replace(readers[before], latest)
            before, latest = layer, outputs[layer]
        else:
            latest = _copy(graph, blocks[number], number, layer, {inputs[number]: latest}, tensors)
    _replace(readers[before], latest)
    for values in (graph.inputs, graph.outputs):
        numbered = sorted(values, key=lambda value: _number(value.name))
        values.clear()
        values.extend(numbered)
    places = {name: place for place, name in enumerate(tensors)}
    ordered = sorted(graph.initializers.values(), key=lambda value: places.get(value.name or "", len(places)))
    graph.initializers.clear()
    for value in ordered:
        graph.register_initializer(value)


def _replace(readers: Sequence[tuple[ir.Node, int]], value: ir.Value) -> None:
    """Have the readers of a layer's output read `value` instead."""
    for node, index in readers:
        node.replace_input_with(index, value)


def _number(name: str | None) -> int:
    """The layer's number in a name, -1 where there is none."""
    number = NUMBER.search(name or "")
    return int(number[0]) if number else -1


def _copy(
    graph: ir.Graph,
    block: Sequence[ir.Node],
    old: int,
    new: int,
    inputs: dict[ir.Value, ir.Value],
    tensors: Mapping[str, torch.Tensor],
) -> ir.Value:
    """Put a copy of layer `old`'s nodes behind the latest layer, as layer `new`; returns its output.

    `inputs` maps what layer `old` reads to what layer `new` reads. The caller gives the layer's input; states and
    parameters are added here.
    """

    def renamed(name: str | None) -> str:
        return NUMBER.sub(lambda found: str(new) if found[0] == str(old) else found[0], name or "")

    ((before, latest),) = inputs.items()
    read = _read(graph, block)
    assert before in read, f"layer {old} does not read the layer before it"
    for value in [*graph.inputs, *(value for value in read if value.is_initializer())]:
        name = renamed(value.name)
        if name == value.name:
            continue
        if not value.is_initializer():
            inputs[value] = ir.Value(name=name, shape=value.shape, type=value.type)
            graph.inputs.append(inputs[value])
        elif name in tensors:  # it is no constant
            inputs[value] = add_initializer(graph, TorchTensor(tensors[name], name=name))
    states = [value for value in graph.outputs if renamed(value.name) != value.name]
    copy = ir.GraphView(read, [block[-1].outputs[0], *states], nodes=block).clone()
    for value, own in zip(read, copy.inputs, strict=True):
        ir.convenience.replace_all_uses_with(own, inputs.get(value, value))
    output, *written = copy.outputs
    copy.outputs.clear()
    for node in RecursiveGraphIterator(copy):
        node.metadata_props[SCOPES] = renamed(node.metadata_props.get(SCOPES))
        for each in (node, *node.outputs):
            each.name = f"{each.name}.{new}"
    for value, own in zip(states, written, strict=True):
        own.name = renamed(value.name)
    made = list(copy)
    copy.remove(made)
    after = latest.producer()
    assert after is not None
    graph.insert_after(after, made)
    graph.outputs.extend(written)
    return output


def _read(graph: ir.Graph, block: Sequence[ir.Node]) -> list[ir.Value]:
    """The values of the graph that the nodes, and those in their branches, read and do not make."""
    made = {value for node in block for value in node.outputs}
    nodes = RecursiveGraphIterator(ir.GraphView([], [], nodes=block))
    found = (value for node in nodes for value in node.inputs if value is not None and value.graph is graph)
    return [value for value in dict.fromkeys(found) if value not in made]
