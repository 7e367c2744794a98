"""How often guesses were right, and how many are worth a step.

B slots of a step, k guesses of a slot.
"""

from collections.abc import Sequence

# What a step of several tokens costs more than one of a single token, and each further token, in steps of one token:
# measured with doge-3m on a CPU; see `step_cost`.
CHECK_COST, ROW_COST = 0.25, 0.3
MARGIN = 1.05  # how many times as many tokens for the cost guesses must promise
MEMORY = 0.95  # the weight that a guess keeps once another one has been checked
FIRST_RATE, FIRST_WEIGHT = 0.7, 1.0  # what is assumed before anything was checked, and the guesses that it counts for


class Record:
    """The share of right guesses among those that were checked, the latest counting most; `first` before any was."""

    def __init__(self, first: float = FIRST_RATE) -> None:
        self._right, self._checked = first * FIRST_WEIGHT, FIRST_WEIGHT

    @property
    def rate(self) -> float:
        """The probability that the next guess is right, where those before it were."""
        return self._right / self._checked

    @property
    def most(self) -> int:
        """The most guesses in a row that so little experience supports: two at first, twice as many as were checked."""
        return int(2 * self._checked)

    def note(self, guesses: int, right: int) -> None:
        """Of so many guesses in a row the first `right` were right; what followed a wrong one was not checked."""
        for guess in range(min(right + 1, guesses)):
            self._right = MEMORY * self._right + (guess < right)
            self._checked = MEMORY * self._checked + 1.0


def expected_tokens(rate: float, guesses: int) -> float:
    """The tokens that a step brings: the right guesses before the first wrong one, and the model's own next token."""
    return guesses + 1.0 if rate >= 1.0 else (1.0 - rate ** (guesses + 1)) / (1.0 - rate)


def step_cost(slots: int, guesses: int, guess_cost: float) -> float:
    """What a step with so many guesses a slot costs, in steps of one slot with one token."""
    rows = ROW_COST * (slots * (guesses + 1) - 1)
    return 1.0 + rows + (CHECK_COST + guess_cost * guesses if guesses else 0.0)


def best_guesses(rates: Sequence[float], limits: Sequence[int], others: int, slots: int, guess_cost: float) -> int:
    """How many guesses k of each sequence, at most its limit, bring most tokens for a step's cost; 0 for none.

    `rates`: of the sequences that have guesses. `others`: sequences that have none. `slots`: B. `guess_cost`: what
    making a guess of each sequence costs, in steps.
    """
    best, most = 0, MARGIN * (len(rates) + others) / step_cost(slots, 0, guess_cost)
    for guesses in range(1, max(limits, default=0) + 1):
        tokens = others + sum(
            expected_tokens(rate, min(guesses, limit)) for rate, limit in zip(rates, limits, strict=True)
        )
        gain = tokens / step_cost(slots, guesses, guess_cost)
        if gain > most:
            best, most = guesses, gain
    return best
