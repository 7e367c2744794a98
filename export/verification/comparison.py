"""Compare logits with the eager model's: one by one, or by their mean KL divergence.

V vocabulary, or the labels of a classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.quantization.schemes import find_scheme
from export.verification.cases import Case
from runtime.artifact.manifest import Graph

LOGIT_TOLERANCE = 1e-4  # times max(1, max|logit|), float32
# Limits of the mean KL divergence, in nats a position. A quantisation scheme has its own.
NARROW_KL_LIMIT = 1e-3  # float16 and bfloat16, against the float32 model
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
    return None if graph.dtype == "float32" else NARROW_KL_LIMIT


def compare(case: Case, expected: list[np.ndarray], found: list[np.ndarray], kl_limit: float | None) -> Comparison:
    """Hold the graph's logits, (positions, V) a slot, against the eager model's: one by one, or by `kl_limit`."""
    eager = np.concatenate([e[: len(f)] for e, f in zip(expected, found, strict=True)]).astype(np.float64)
    graph = np.concatenate(found).astype(np.float64)
    difference = np.abs(eager - graph).max(-1)
    if eager.shape[1] == 1:  # the one label of a classifier stands against zero, as a sigmoid reads it
        eager, graph = (np.pad(x, ((0, 0), (0, 1))) for x in (eager, graph))
    limit = LOGIT_TOLERANCE * max(1.0, float(np.abs(eager).max()))
    with np.errstate(invalid="ignore"):  # what is not finite does not pass
        log_eager, log_graph = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (eager, graph))
        mean_kl = float((np.exp(log_eager) * (log_eager - log_graph)).sum(-1).mean())
    two = np.partition(eager, -2, axis=-1)[:, -2:]
    agree = eager.argmax(-1) == graph.argmax(-1)
    flips = int((~agree & (two[:, 1] - two[:, 0] > limit)).sum())  # where the eager margin exceeds the limit
    exact = kl_limit is None
    finite = bool(np.isfinite(graph).all())
    passed = finite and (float(difference.max()) <= limit and flips == 0 if exact else mean_kl <= kl_limit)
    return Comparison(
        case.name, len(eager), float(difference.max()), limit if exact else None,
        mean_kl, kl_limit, float(agree.mean()), flips, passed,
    )  # fmt: skip


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
