"""State space duality for ONNX: one product for c, b and x, and the form of the scan chosen by the number of tokens.

B batch, S tokens, D hidden size, H heads, d head size.
"""

import torch
from torch import nn

from export.forms.options import FormOptions
from export.forms.projection import HeadProjection
from wm_models.layers.ssd import SSDMixer, recur, scan_chunks


def recur_or_scan(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both forms under an If: in a decode step the small nodes of chunks would cost more than their products."""
    inputs = (c, b, x, log_decay, state)

    def one(
        c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        first = (part.narrow(2, 0, 1) for part in (c, b, x, log_decay))
        y, new = recur(*first, state)  # type: ignore[call-arg]
        return _dense(y.expand(-1, -1, x.shape[2], -1)), _dense(new)

    def many(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, new = scan_chunks(*inputs, chunk=chunk)  # type: ignore[call-arg]
        return _dense(y), _dense(new)

    return torch.cond(x.shape[2] == 1, one, many, inputs)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A copy in the order of its dimensions: the results of two branches must have the same strides."""
    return x.clone(memory_format=torch.contiguous_format)


class SSDForm(SSDMixer):
    """`SSDMixer` with its projections side by side."""

    by_length = staticmethod(recur_or_scan)

    def __init__(self, ssd: SSDMixer, options: FormOptions):
        nn.Module.__init__(self)  # not SSDMixer's: nothing is drawn, and the parameters are the layer's own
        self.layer, self.head_size, self.chunk = ssd.layer, ssd.head_size, ssd.chunk
        self.fused = HeadProjection((ssd.c_proj, ssd.b_proj, ssd.x_proj), ssd.head_size)
        self.dt_proj, self.A_log, self.out_proj = ssd.dt_proj, ssd.A_log, ssd.out_proj

    def project_heads(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.fused(u)
