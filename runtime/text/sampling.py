"""Choose the next tokens from logits.

B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import RequestError
from runtime.options import option

LARGEST = 1e300  # where penalised logits end, so that their differences are finite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: repetition penalty, temperature, top-k, top-p, in this order.

    `temperature` 0 takes the largest logit, the first of equals. `top_k` 0 or above V and `top_p` 1 keep every token,
    `top_p` 0 the argmax alone; tokens that tie with the k-th are kept too. A `repetition_penalty` above 1 makes tokens
    that occurred less likely. `seed` makes the draws repeatable. Each is defined as in transformers' processors. Raises
    `RequestError` for other values.
    """

    temperature: float = option(0.0, "0 takes the most likely token.")
    top_k: int = option(0, "Sample among the k most likely tokens; 0: all.")
    top_p: float = option(1.0, "Sample among the most likely tokens that make up this share.")
    repetition_penalty: float = option(1.0, "Above 1 discourages repetition.")
    seed: int | None = option(None, "Makes sampling repeatable.")

    def __post_init__(self) -> None:
        whole, number = (int, np.integer), (int, float, np.integer, np.floating)
        for name, kinds, valid, expected in (
            ("temperature", number, lambda value: 0 <= value < np.inf, "0 (greedy) or more"),
            ("top_k", whole, lambda value: value >= 0, "0 (off) or more, an integer"),
            ("top_p", number, lambda value: 0 <= value <= 1, "0 to 1 (off)"),
            ("repetition_penalty", number, lambda value: 0 < value < np.inf, "more than 0, 1 for none"),
            ("seed", (*whole, type(None)), lambda value: value is None or value >= 0, "0 or more, or none"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not valid(value):
                raise RequestError(f"{name} is {str(value)[:60]}; expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether the next token is simply the one with the largest logit."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0


GREEDY = Sampling()


class Sampler:
    """Chooses one sequence's tokens as `sampling` says, with draws of its own.

    Raises `RequestError` for logits of which the largest is not finite.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.draw = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, seen: Sequence[Sequence[int]]) -> np.ndarray:
        """The next ids (B,), int64, from logits (B, V), float32, and the ids so far of each row."""
        return np.array([self._one(row, ids) for row, ids in zip(logits, seen, strict=True)], np.int64)

    def _one(self, logits: np.ndarray, seen: Sequence[int]) -> int:
        how, best = self.sampling, int(logits.argmax())  # of a NaN, where there is one
        if not np.isfinite(logits[best]):
            raise RequestError(f"the largest logit is {logits[best]}; the weights or the dtype overflow")
        if how.greedy:
            return best
        scores = logits.astype(np.float64)
        if how.repetition_penalty != 1.0 and len(seen):
            ids = np.unique(np.asarray(seen))
            values = scores[ids]
            with np.errstate(over="ignore"):
                values = np.where(values > 0, values / how.repetition_penalty, values * how.repetition_penalty)
            scores[ids] = values.clip(-LARGEST, LARGEST)
        if how.temperature == 0.0:
            return int(scores.argmax())
        with np.errstate(over="ignore"):  # a tiny temperature leaves the argmax alone
            scaled = (scores - scores.max()) / how.temperature
        if 0 < how.top_k < scaled.size:
            scaled[scaled < np.partition(scaled, -how.top_k)[-how.top_k]] = -np.inf
        weights = np.exp(scaled)
        if how.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            total = np.cumsum(weights[order])
            # the fewest most likely tokens that reach top_p, and at least one
            weights[order[1:][total[:-1] >= how.top_p * total[-1]]] = 0.0
        total = np.cumsum(weights)
        # below the total, or rounding could draw past the last token that has a weight
        drawn = min(self.draw.random() * total[-1], np.nextafter(total[-1], 0.0))
        return int(np.searchsorted(total, drawn, side="right"))
