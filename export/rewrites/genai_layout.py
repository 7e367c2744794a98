"""Give the step graph the inputs and outputs that onnxruntime-genai binds, over the same weights and caches.

    attention_mask (B, T)                    in the place of cache_lengths and sequence_lengths
    past_key_values.i.key, .value            an attention layer's caches, written in place in shared buffers
    past_key_values.N+j.key, .value          the biases of two attention layers, declared as a further layer
    past_key_values.i.recurrent_state        an SSD layer's state, beside a conv_state that nothing reads

genai pads prompts on the right and keeps one buffer for a cache's input and output. Each row of a batch has a length of
its own here: padded tokens are overwritten, so the caches have no holes.

B batch, S new tokens, T tokens so far with the new ones, C cache capacity, N layers of the model, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from export.rewrites.initializer import add_initializer
from export.rewrites.last_row import take_last_row
from runtime.artifact.manifest import EVICTED, State

PREFIX = "genai"  # of the names of what is added
PAST, PRESENT = "past_key_values", "present"
HALVES = ("key", "value")  # of what genai calls a layer: both have one shape
RECURRENT, CONVOLUTION = "recurrent_state", "conv_state"


@dataclass
class GenaiLayout:
    """The model's states by their names in genai, `past_key_values.` left out; and how many layers genai counts.

    `names`: of each of the graph's state inputs. `unread`: states that genai binds and no node reads, with their
    shapes' and type's example among the state inputs, None for a `conv_state`.
    """

    layers: int
    names: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str | None] = field(default_factory=dict)


def genai_layout(states: Sequence[State], layers: int) -> GenaiLayout:
    """Names for the states of a model of `layers` layers. An odd number of biases gets a filler, to make a pair."""
    layout, biases = GenaiLayout(layers), []
    for state in states:
        _, layer, kind = state.input.split(".")
        if kind == "bias":
            biases.append(state.input)
        elif kind in HALVES:
            layout.names[state.input] = f"{layer}.{kind}"
        else:
            layout.names[state.input] = f"{layer}.{RECURRENT}"
            layout.unread[f"{layer}.{CONVOLUTION}"] = None
    for place, name in enumerate(biases):
        layout.names[name] = f"{layers + place // 2}.{HALVES[place % 2]}"
    if len(biases) % 2:
        layout.unread[f"{layers + len(biases) // 2}.{HALVES[1]}"] = biases[-1]
    layout.layers += (len(biases) + 1) // 2
    return layout


def to_genai(model: ir.Model, layout: GenaiLayout) -> None:
    """Rewrite the step graph in place."""
    graph = model.graph
    take_last_row(graph)
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    mask = _read_mask(graph, inputs)
    graph.inputs.clear()
    graph.inputs.extend([inputs["input_ids"], mask])
    for name, renamed in layout.names.items():
        inputs[name].name, outputs[f"{name}.out"].name = f"{PAST}.{renamed}", f"{PRESENT}.{renamed}"
        graph.inputs.append(inputs[name])
    for name, like in layout.unread.items():
        shape, kind = ir.Shape(["batch", 1, 1]), ir.TensorType(ir.DataType.FLOAT)
        if like is not None:
            shape, kind = inputs[like].shape, inputs[like].type
        past, present = (ir.Value(name=f"{end}.{name}", shape=shape, type=kind) for end in (PAST, PRESENT))
        graph.append(ir.node("Identity", [past], name=f"{PREFIX}.{name}", outputs=[present]))
        graph.inputs.append(past)
        graph.outputs.append(present)


def _read_mask(graph: ir.Graph, inputs: dict[str, ir.Value]) -> ir.Value:
    """Compute each row's lengths from a new input, the mask (B, T) of ones and zeros, and use them for the old inputs.

    A row has as many new tokens as there are ones in the mask's last S columns, and all other ones are in its cache.
    """
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["batch", "total"]), type=ir.TensorType(ir.DataType.INT64))
    columns = add_initializer(graph, ir.tensor(np.array([1], np.int64), name=f"{PREFIX}.columns"))
    end = add_initializer(graph, ir.tensor(np.array([np.iinfo(np.int64).max]), name=f"{PREFIX}.end"))
    nodes: list[ir.Node] = []

    def compute(name: str, operator: str, *operands: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(operator, list(operands), attributes, name=f"{PREFIX}.{name}")
        node.outputs[0].name = node.name
        nodes.append(node)
        return node.outputs[0]

    length = compute("length", "Shape", inputs["input_ids"], start=1, end=2)
    recent = compute("recent", "Slice", mask, compute("back", "Neg", length), end, columns)
    total = compute("total_lengths", "ReduceSum", mask, columns, keepdims=0)
    new = compute("sequence_lengths", "ReduceSum", recent, columns, keepdims=0)
    found = {"cache_lengths": compute("cache_lengths", "Sub", total, new), "sequence_lengths": new}
    if EVICTED in inputs:  # genai takes no rows out of its caches
        found[EVICTED] = compute("evicted_lengths", "Sub", total, total)
    for name, value in found.items():
        ir.convenience.replace_all_uses_with(inputs[name], value)
    graph.insert_before(graph[0], nodes)
    return mask
