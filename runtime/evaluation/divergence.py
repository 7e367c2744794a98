"""How far a model's predictions are from another's: the KL divergence of each position, and where it is largest.

n positions, V vocabulary.
"""

import heapq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Position(NamedTuple):
    """One position of a text: the KL divergence there, and each model's most probable token with its probability.

    `document` and `place`: the text's number, and the place of the token that is predicted.
    """

    kl: float
    document: int
    place: int
    choice: tuple[int, float]
    other_choice: tuple[int, float]


@dataclass
class Divergence:
    """KL divergences of a model's predictions from those of `other`, nats; the `count` largest with their place."""

    count: int
    _values: list[np.ndarray] = field(default_factory=list)
    _agreed: int = 0
    _worst: list[Position] = field(default_factory=list)

    def add(self, document: int, start: int, logprobs: np.ndarray, other: np.ndarray) -> None:
        """Take note of n positions from `start` on: the logprobs (n, V), float64, of the model and of the other."""
        kl = np.maximum((np.exp(other) * (other - logprobs)).sum(-1), 0.0)  # what rounding takes below 0 is 0
        top, other_top = logprobs.argmax(-1), other.argmax(-1)
        self._values.append(kl)
        self._agreed += int((top == other_top).sum())
        for at in np.argsort(-kl, kind="stable")[: self.count]:
            one, two = int(top[at]), int(other_top[at])
            choices = (one, float(np.exp(logprobs[at, one]))), (two, float(np.exp(other[at, two])))
            heapq.heappush(self._worst, Position(float(kl[at]), document, start + int(at), *choices))
            if len(self._worst) > self.count:
                heapq.heappop(self._worst)

    @property
    def values(self) -> np.ndarray:
        """The divergence at each position, in the order of the text, nats."""
        return np.concatenate(self._values)

    @property
    def worst(self) -> list[Position]:
        """The positions where it is largest, the largest first."""
        return sorted(self._worst, key=lambda each: (-each.kl, each.document, each.place))

    def summary(self) -> dict[str, Any]:
        """Mean, 99th percentile and maximum, nats, and the share of positions where the argmax is the same."""
        values = self.values
        return {
            "mean_kl": float(values.mean()),
            "kl_99th_percentile": float(np.percentile(values, 99)),
            "max_kl": float(values.max()),
            "argmax_agreement": self._agreed / values.size,
        }
