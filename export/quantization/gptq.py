"""Codes and scales that change a product with the weight least (GPTQ, arXiv 2210.17323).

Column by column, each column's error is compensated in the columns after it; then scales and codes are fitted by turns.
Inside, a weight lies transposed, so that a column's numbers are side by side, and what the columns before a block mean
for it is one product.

N rows (output features), K columns (input features), G blocks of columns that share a scale.
"""

import numpy as np
import torch

SHRINK = np.linspace(0.6, 1.0, 17)  # of the largest weight in a block: candidates for what the largest code means
DAMPING = 0.01, 1.0  # the least and the most, in the mean diagonal of the activations' second moments
CAUTION = 5  # times the shrinkage that estimates the moments themselves best: their inverse is used, and errs more
CHUNK, TILE = 2048, 256  # rows taken at a time, and those of steps whose intermediates are to stay in a core's cache
STRIDE = 32  # columns that are rounded one by one between two products


def scale_search(weight: torch.Tensor, importance: torch.Tensor, largest: int) -> torch.Tensor:
    """The scales (G, N) of column blocks (G, block, N) that lose least, errors weighted by importance (G, block).

    There is one more code below zero than above. A scale is negative where the largest weight of its block is positive,
    so that this weight has the lowest code, and steps are smaller.
    """
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    peak = torch.where(high > -low, -high.clamp(min=1e-12), (-low).clamp(min=1e-12)) / largest
    unit, shares = weight / peak, importance[:, None]
    best, least = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for shrink in SHRINK.tolist():
        codes = (unit / shrink).round_().clamp_(-largest - 1, largest)
        loss = shares @ torch.sub(unit, codes, alpha=shrink).square_()
        best, least = torch.where(loss < least, shrink, best), torch.minimum(loss, least)
    return (best * peak)[:, 0]


def damping_of(moments: torch.Tensor, tokens: int) -> float:
    """The damping, see `round_with_feedback`, of moments (K, K) that were summed over so few tokens.

    What is chance in them grows with the directions that activations spread over, and falls with the tokens: a multiple
    of the shrinkage towards the mean diagonal that estimates moments best (OAS, arXiv 0907.4698).
    """
    size = len(moments)
    trace, square = float(moments.trace()) ** 2, float(moments.square().sum(dtype=torch.float64))
    own, rest = (1 - 2 / size) * square + trace, (tokens + 1 - 2 / size) * (square - trace / size)
    least, most = DAMPING
    return min(max(CAUTION * own / max(rest, 1e-12), least), most)


@torch.inference_mode()
def round_with_feedback(
    weight: torch.Tensor, bits: int, block: int, moments: torch.Tensor, damping: float = DAMPING[0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales that keep W·x, for x of these second moments (K, K), rather than W.

    GPTQ finds codes for the scales of `scale_search`; then the scales are fitted to the codes, each code is once more
    set to its best while all others stand, and the scales are fitted again. The larger `damping`, a share of the
    moments' mean diagonal, the nearer W itself is kept.
    """
    exact = moments.double()
    exact += damping * exact.diagonal().mean().clamp(min=1e-12) * torch.eye(len(exact), dtype=torch.float64)
    order = exact.diagonal().argsort(descending=True)
    upper, moments = _inverse_factor(exact[order][:, order]).float(), exact.float()
    importance, lowest, highest = moments.diagonal().view(-1, block), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = []
    for rows in weight.split(CHUNK):
        columns = rows.T.contiguous()
        tiles = columns.view(len(importance), block, -1).split(TILE, dim=2)
        scales = torch.cat([scale_search(tile, importance, highest) for tile in tiles], dim=1)
        codes = _feed_back(columns, scales.repeat_interleave(block, 0), order, upper, lowest, highest)
        products = moments @ columns
        scales = _fitted(products, codes, scales, moments)
        codes = _descend(products, codes, scales.repeat_interleave(block, 0), moments, lowest, highest)
        found.append((codes.T, _fitted(products, codes, scales, moments).T))
    codes, scales = (torch.cat(parts).contiguous() for parts in zip(*found, strict=True))
    return codes, scales


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with UᵀU = M⁻¹, for M (K, K): the inverse of the factor of M with its order reversed."""
    return _inverse_of_lower(torch.linalg.cholesky(moments.flip(0, 1))).flip(0, 1)


def _inverse_of_lower(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix (K, K), by halves: in products, which are faster than substitution."""
    half = len(lower) // 2
    if half < STRIDE:
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ -inverse[:half, :half])
    return inverse


def _feed_back(
    weight: torch.Tensor, scales: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """GPTQ: the columns in `order`, those of the largest activations first, each one's error made good in the rest.

    weight, scales and result (K, N); upper (K, K), the `_inverse_factor` of the ordered moments.
    """
    weight, scales, factor = weight[order], scales[order], upper / upper.diagonal()[:, None]
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    columns = list(zip(weight, scales, factor, codes, errors, strict=True))  # views, made once
    for start in range(0, len(order), STRIDE):
        end = min(start + STRIDE, len(order))
        weight[start:end] -= factor[:start, start:end].T @ errors[:start]
        for at, (column, scale, row, code, error) in enumerate(columns[start:end], start + 1):
            torch.div(column, scale, out=code).round_().clamp_(lowest, highest)
            torch.addcmul(column, code, scale, value=-1, out=error)
            weight[at:end].addr_(row[at:end], error, alpha=-1)
    return codes[order.argsort()]


def _fitted(products: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The scales (G, N) that lose least with these codes (K, N): for each row, one linear system.

    products (K, N): the moments times the weight. A scale that would leave the range from half to twice its old value
    stays as it was.
    """
    parts = zip(*(each.split(TILE, dim=1) for each in (products, codes, scales)), strict=True)
    return torch.cat([_fitted_tile(product, code, scale, moments) for product, code, scale in parts], dim=1)


def _fitted_tile(
    products: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    count, rows = scales.shape
    codes, block = codes.contiguous(), len(codes) // count
    blocks = codes.view(count, block, rows)
    system = torch.empty(count, count, rows)
    for at in range(count):
        start, end = at * block, (at + 1) * block
        product = (moments[start:, start:end] @ codes[start:end]).view(count - at, block, rows)
        system[at, at:] = system[at:, at] = product.mul_(blocks[at:]).sum(1)
    system = system.permute(2, 0, 1).double().contiguous()
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)  # a row may be all zeros
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    target = (codes * products).view(count, block, rows).sum(1).T.double()
    fitted = torch.linalg.solve(system, target).float().T
    change = fitted / scales
    return torch.where((change > 0.5) & (change < 2), fitted, scales)


def _descend(
    products: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """Coordinate descent: column by column, the code that loses least given all others. All (K, N)."""
    slope = products - moments @ (codes * scales)  # of the loss, halved and with its sign turned
    found, changes = torch.empty_like(codes), torch.empty_like(codes)
    inverses = 1 / (scales * moments.diagonal()[:, None])
    columns = list(zip(slope, inverses, scales, moments, codes, found, changes, strict=True))
    for start in range(0, len(codes), STRIDE):
        end = min(start + STRIDE, len(codes))
        slope[start:end] -= moments[start:end, :start] @ changes[:start]
        for at, (descent, inverse, scale, row, old, code, change) in enumerate(columns[start:end], start + 1):
            torch.addcmul(old, descent, inverse, out=code).round_().clamp_(lowest, highest)
            torch.sub(code, old, out=change).mul_(scale)
            slope[at:end].addr_(row[at:end], change, alpha=-1)
    return found
