"""Codes and scales that change a product with the weight least (GPTQ, arXiv 2210.17323).

Column by column, each column's error is compensated in the columns after it; then scales and codes are fitted by turns.
N rows (output features), K columns (input features).
"""

import numpy as np
import torch

SHRINK = np.linspace(0.6, 1.0, 17)  # of the largest weight in a block: candidates for what the largest code means
DAMPING = 0.01  # of the mean diagonal of the activations' second moments
CHUNK, STRIDE = 1024, 32  # rows and columns taken at a time, so that they stay in a core's cache


def scale_search(weight: torch.Tensor, importance: torch.Tensor, largest: int) -> torch.Tensor:
    """The scale of each row of a block (N, block) that loses least, errors weighted by `importance` (block): (N, 1)."""
    peak = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    best, least = peak, torch.full_like(peak, torch.inf)
    for shrink in SHRINK:
        scale = peak * float(shrink)
        rounded = (weight / scale).round().clamp(-largest - 1, largest) * scale
        loss = ((rounded - weight).square() * importance).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


def round_with_feedback(
    weight: torch.Tensor, bits: int, block: int, moments: torch.Tensor, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that keep W·x, for x of these second moments (K, K), rather than W.

    GPTQ finds codes for the scales of `scale_search`; then the scales are fitted to the codes, each code is once more
    set to its best while all others stand, and the scales are fitted again. The larger `damping`, a share of the
    moments' mean diagonal, the nearer W itself is kept.
    """
    moments = moments.double()
    moments += damping * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moments), dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(moments[order][:, order]), upper=True).float()
    importance, lowest, highest = moments.diagonal().float().split(block), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = []
    for rows in weight.split(CHUNK):
        parts = zip(rows.split(block, dim=1), importance, strict=True)
        scales = torch.cat([scale_search(part, weights, highest) for part, weights in parts], dim=1)
        codes = _feed_back(rows, scales.repeat_interleave(block, 1), order, upper, lowest, highest)
        scales = _fitted(rows, codes, scales, moments)
        codes = _descend(rows, codes, scales.repeat_interleave(block, 1), moments.float(), lowest, highest)
        found.append((codes, _fitted(rows, codes, scales, moments)))
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales


def _feed_back(
    weight: torch.Tensor, scales: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """GPTQ: the columns in `order`, those of the largest activations first, each one's error made good in the rest.

    weight, scales and result (N, K); upper (K, K), the Cholesky factor of the ordered moments' inverse.
    """
    weight, scales, codes = weight[:, order], scales[:, order], torch.empty_like(weight)
    for start in range(0, len(order), STRIDE):
        end, errors = min(start + STRIDE, len(order)), []
        for at in range(start, end):
            code = (weight[:, at] / scales[:, at]).round().clamp(lowest, highest)
            codes[:, order[at]] = code
            errors.append((weight[:, at] - code * scales[:, at]) / upper[at, at])
            weight[:, at:end] -= errors[-1][:, None] * upper[at, at:end]
        weight[:, end:] -= torch.stack(errors, dim=1) @ upper[start:end, end:]
    return codes


def _fitted(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The scales (N, K / block) that lose least with these codes (N, K): for each row, one linear system.

    A scale that would leave the range from half to twice its old value stays as it was.
    """
    rows, blocks = scales.shape
    codes = codes.double().view(rows, blocks, -1)
    products = moments.view(blocks, codes.shape[2], blocks, -1)
    system = torch.einsum("nab,abcd,ncd->nac", codes, products, codes)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)  # a row may be all zeros
    system += ridge[:, None, None] * torch.eye(blocks)
    target = (codes * (weight.double() @ moments).view_as(codes)).sum(-1)
    fitted = torch.linalg.solve(system, target).float()
    return torch.where((fitted > scales / 2) & (fitted < scales * 2), fitted, scales)


def _descend(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """Coordinate descent: column by column, the code that loses least given all others. All (N, K)."""
    codes = codes.clone()
    slope = (weight - codes * scales) @ moments  # of the loss, halved and with its sign turned
    for at in range(codes.shape[1]):
        step = slope[:, at] / (moments[at, at] * scales[:, at])
        code = (codes[:, at] + step).round().clamp(lowest, highest)
        slope -= ((code - codes[:, at]) * scales[:, at])[:, None] * moments[at]
        codes[:, at] = code
    return codes
