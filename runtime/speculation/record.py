"""How often guesses were right."""

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
