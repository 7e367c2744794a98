"""The quantisation schemes, one entry each: what `--quantize` takes, and all that depends on it.

N rows (output features), K columns (input features).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from export.errors import ExportError
from export.quantization.calibration import LENGTH, ROWS
from export.quantization.gptq import damping_of, round_with_feedback
from export.quantization.nearest import round_to_nearest

BLOCKS = (128, 64, 32, 16)  # weights to a scale: of those up to a largest, the first that divides K
TABLE_DAMPING = 0.3  # for a table whose rows are also embeddings: those must stay near, whatever reads them


@dataclass(frozen=True)
class Weight:
    """A weight to round: `values` (N, K), float32, with `block` weights to a scale.

    `moments` (K, K), float32: the sum of xᵀx over the activations x that it is multiplied with, or None where the
    scheme does not calibrate or nothing is multiplied with it. `looked_up`: its rows are read as embeddings too.
    """

    values: torch.Tensor
    block: int
    moments: torch.Tensor | None = None
    looked_up: bool = False


Codes: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scheme:
    """How weights become integers.

    `bits` of a stored code: 8 or 4. `block`: weights to a scale at most, unless asked for; also of a table of
    embeddings, whatever is asked for. `kl_limit`: what verification allows, in nats, mean over positions. `calibrates`:
    `round` wants second moments of the activations. `round` returns codes (N, K), integers from -2^(bits-1) to
    2^(bits-1) - 1 in a float tensor, and scales (N, K / block), float32, of either sign.
    """

    name: str
    bits: int
    block: int
    kl_limit: float
    calibrates: bool
    round: Callable[[Weight], Codes]


def _nearest(bits: int, weight: Weight) -> Codes:
    return round_to_nearest(weight.values, bits, weight.block)


def _gptq(bits: int, weight: Weight) -> Codes:
    if weight.moments is None:
        return _nearest(bits, weight)
    damping = TABLE_DAMPING if weight.looked_up else damping_of(weight.moments, ROWS * LENGTH)
    return round_with_feedback(weight.values, bits, weight.block, weight.moments, damping)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", bits=8, block=128, kl_limit=2e-3, calibrates=False, round=partial(_nearest, 8)),
        Scheme("int4", bits=4, block=32, kl_limit=3e-2, calibrates=True, round=partial(_gptq, 4)),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises `ExportError` where none is registered."""
    if name not in SCHEMES:
        raise ExportError(f"{name!r} is no quantisation scheme; expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
