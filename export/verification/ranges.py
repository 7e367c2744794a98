"""Numbers that should not be, found and named before anything is lowered."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from export.errors import ExportError
from wm_models.layers.attention import DMAttention


def check_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise `ExportError` that names every tensor with a value that is not finite, or would not be in `dtype`."""
    faults = []
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value = value.detach()
        if not value.is_floating_point():
            continue
        wrong = ~torch.isfinite(value)
        kind = "not finite"
        if not wrong.any():
            wrong, kind = ~torch.isfinite(value.to(dtype)), f"beyond {_name(dtype)}"
        if count := int(wrong.sum()):
            place = [int(index) for index in wrong.nonzero()[0]]
            faults.append(
                f"{name}: {count} of {value.numel()} {kind}, the first, {float(value[tuple(place)])}, at {place}"
            )
    if faults:
        more = f"; and {len(faults) - 5} more tensors" if len(faults) > 5 else ""
        raise ExportError(
            f"weights that no graph can use: {'; '.join(faults[:5])}{more}; mend the checkpoint or choose --dtype"
        )


@dataclass
class BiasRange:
    """The largest softplus(dt) and exponent A·softplus(dt) that an attention layer had."""

    softplus: float = 0.0
    exponent: float = -math.inf


@contextmanager
def watched_biases(model: nn.Module) -> Iterator[dict[str, BiasRange]]:
    """While the block runs, what the biases of each attention layer depend on, by the layer's name."""
    seen: dict[str, BiasRange] = {}
    hooks = []

    def watch(name: str, layer: DMAttention) -> None:
        def look(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor) -> None:
            softplus = F.softplus(inputs[0].float())
            found = seen.setdefault(name, BiasRange())
            found.softplus = max(found.softplus, float(softplus.max()))
            found.exponent = max(found.exponent, float((layer.A.float() * softplus).max()))

        hooks.append(layer.key_bias.register_forward_hook(look))

    for name, module in model.named_modules():
        if isinstance(module, DMAttention):
            watch(name, module)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_biases(seen: dict[str, BiasRange], dtype: torch.dtype) -> None:
    """Raise `ExportError` where a bias exp(A·softplus(dt)) that was seen is beyond `dtype`."""
    limit = math.log(torch.finfo(dtype).max)
    over = {name: found.exponent for name, found in seen.items() if not found.exponent <= limit}
    if over:
        name = max(over, key=lambda name: over[name])
        raise ExportError(
            f"{name}: its bias exp(A·softplus(dt)) reaches e^{over[name]:.1f} and {_name(dtype)} ends at "
            f"e^{limit:.1f} ({len(over)} of {len(seen)} layers overflow); choose a --dtype of wider range"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
