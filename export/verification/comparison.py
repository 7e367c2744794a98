"""Compare logits with the eager model's: one by one, or by their mean KL divergence.

V vocabulary, or the labels of a classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from export.quantization.schemes import find_scheme
from export.verification.cases import Case
from runtime.artifact.manifest import Graph

LOGIT_TOLERANCE = 1e-4  # times max(1, max|logit|), float32
# Limits of the mean KL divergence, in nats a position. A quantisation scheme of weights has its own.
NARROW_KL_LIMIT = 1e-3  # float16 and bfloat16, against the float32 model
INT8_CACHE_KL_LIMIT = find_scheme("int8").kl_limit  # int8 caches of a graph whose weights are floats
ROUNDED_PRODUCTS_KL_LIMIT = 2e-3  # between two graphs over the same codes, one of which rounds activations to 8 bits


@dataclass(frozen=True)
class Comparison:
    """The verdict on one case. Differences are of logits; KL in nats, of the eager distribution from the graph's."""

    case: str
    positions: int
    max_difference: float
    difference_limit: float | None
    mean_kl: float
    kl_limit: float | None
    argmax_agreement: float
    argmax_flips: int
    passed: bool


def kl_limit(graph: Graph) -> float | None:
    """The limit of the mean KL divergence for a graph; None where logits are compared one by one."""
    if graph.quantization != "none":
        return find_scheme(graph.quantization).kl_limit
    if graph.cache_dtype == "int8":
        return INT8_CACHE_KL_LIMIT
    return None if graph.dtype == "float32" else NARROW_KL_LIMIT


def compare(case: Case, expected: list[np.ndarray], found: list[np.ndarray], kl_limit: float | None) -> Comparison:
    """Hold the graph's logits, (positions, V) a slot, against the eager model's: one by one, or by `kl_limit`."""
    pairs = [(e[: len(f)], f) for e, f in zip(expected, found, strict=True)]
    limit = LOGIT_TOLERANCE * max(1.0, max(float(np.abs(e).max()) for e, _ in pairs))
    figures = np.concatenate([_figures(*pair) for pair in pairs])
    difference, divergence, margin, agrees = figures.T
    largest, mean_kl = float(difference.max()), float(divergence.mean())  # a NaN where there is one
    flips = int(((agrees == 0) & (margin > limit)).sum())  # where the eager margin exceeds the limit
    exact = kl_limit is None
    passed = bool(np.isfinite(difference).all()) and (largest <= limit and flips == 0 if exact else mean_kl <= kl_limit)
    return Comparison(
        case.name, len(figures), largest, limit if exact else None,
        mean_kl, kl_limit, float(agrees.mean()), flips, passed,
    )  # fmt: skip


def _figures(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each position, (positions, 4): max |Δlogit|, KL divergence, margin of the eager argmax, and whether it agrees.

    In float64. The one label of a classifier stands against zero, as a sigmoid reads it.
    """
    eager, graph = (torch.from_numpy(logits).double() for logits in (expected, found))
    difference = (eager - graph).abs().amax(-1)
    if eager.shape[1] == 1:
        eager, graph = (F.pad(logits, (0, 1)) for logits in (eager, graph))
    two, agrees = eager.topk(2, dim=-1).values, eager.argmax(-1) == graph.argmax(-1)
    log_eager, log_graph = (logits.log_softmax(-1) for logits in (eager, graph))
    divergence = (log_eager.exp() * (log_eager - log_graph)).sum(-1)
    return torch.stack([difference, divergence, two[:, 0] - two[:, 1], agrees.double()], dim=-1).numpy()


def summary(verdicts: Sequence[Comparison]) -> str:
    """One line on what verification found; none is compared where an artifact was verified before."""
    if not verdicts:
        return "nothing to compare"
    passed = all(verdict.passed for verdict in verdicts)
    return f"{len(verdicts)} checks passed" if passed else worst(verdicts)


def worst(verdicts: Sequence[Comparison]) -> str:
    """One line on the case that failed by most."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    verdict = max(failed, key=lambda v: (v.mean_kl if v.kl_limit else v.max_difference, v.argmax_flips))
    if verdict.kl_limit is not None:
        measure = f"mean KL {verdict.mean_kl:.2e}, limit {verdict.kl_limit:.0e}"
    else:
        measure = f"max |Δlogit| {verdict.max_difference:.2e}, limit {verdict.difference_limit:.2e}"
    return f"{len(failed)} of {len(verdicts)} checks failed; worst: {verdict.case}: {measure}"
