"""Compare once more with random values of A, so that an error in the biases shows.

Where A is 0, as at the start of training, every key's bias is exp(0) = 1, and adding the same number to all scores
changes nothing: a graph that drops, moves or repeats biases wrongly gives the right answers all the same. So A is drawn
at random once, in the eager model and in a copy of the graph, and the two are compared again.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from runtime.artifact.manifest import Artifact
from wm_models.layers.attention import DMAttention

Values = dict[str, np.ndarray]


@contextmanager
def drawn_biases(model: nn.Module, softplus: float) -> Iterator[Values]:
    """While the block runs, the model's every A is drawn from [-1, 1], in eighths: exact in every dtype.

    Where `softplus`, the largest softplus(dt) to expect, is above 8, the range is halved until no bias passes e^8.
    Layers of equal A stay equal, since the exporter keeps equal tensors once. Gives the values by parameter name; none
    where the model has no such attention.
    """
    layers = {f"{name}.A": module for name, module in model.named_modules() if isinstance(module, DMAttention)}
    before = {name: layer.A.detach().clone() for name, layer in layers.items()}
    draw, unit = np.random.default_rng(0), np.float32(2.0 ** min(-3, -math.ceil(math.log2(max(softplus, 1.0)))))
    kinds = {tuple(value.tolist()): draw.integers(-8, 9, value.shape) * unit for value in before.values()}
    drawn = {name: kinds[tuple(value.tolist())] for name, value in before.items()}
    try:
        _set(layers, {name: torch.from_numpy(value) for name, value in drawn.items()})
        yield drawn
    finally:
        _set(layers, before)


def _set(layers: dict[str, DMAttention], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            layers[name].A.copy_(value)


@contextmanager
def with_biases(artifact: Artifact, drawn: Values) -> Iterator[Artifact]:
    """The artifact with a copy of its graph beside it, in which A is `drawn`, repeated as the graph repeats it."""
    model = ir.load(artifact.path / artifact.graph.cpu_file)
    named = model.graph.initializers
    # graphs of earlier exports have the names of the step graph around the model
    kept = {name: named.get(name.removeprefix("model.")) or named.get(f"model.{name}") for name in drawn}
    if lost := {drawn[name].tobytes() for name in drawn} - {drawn[name].tobytes() for name in drawn if kept[name]}:
        raise KeyError(f"{len(lost)} of the graph's vectors A are not under the names of their layers")
    for name, value in kept.items():
        if value is None:
            continue  # another layer's, equal to it, stands for both
        tensor = value.const_value
        assert tensor is not None
        repeated = np.repeat(drawn[name], tensor.size // len(drawn[name]))
        value.const_value = ir.tensor(repeated.astype(tensor.dtype.numpy()), name=value.name)
    descriptor, name = tempfile.mkstemp(prefix="probe.", suffix=".onnx", dir=artifact.path)  # beside the weights
    path = Path(name)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(ir.serde.serialize_model(model).SerializeToString())
        yield replace(artifact, graph=replace(artifact.graph, file=path.name, cpu_file=path.name))
    finally:
        path.unlink(missing_ok=True)
