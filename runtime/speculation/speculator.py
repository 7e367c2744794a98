"""Which guesses a step checks, for the sequences of one scheduler.

B slots of a step, k guesses of a slot.
"""

from collections.abc import Sequence as Values
from typing import Protocol

from runtime.scheduling.sequence import Sequence
from runtime.speculation.costs import Costs
from runtime.speculation.record import Record

TRIALS = 0.01  # of all steps' cost, what guesses may cost that are not expected to pay
MARGIN = 1.05  # how many times as many tokens for the cost guesses must promise


class Proposer(Protocol):
    """Guesses how sequences go on."""

    def record(self, sequence: Sequence) -> Record | None:
        """How good guesses like those that would come now have been; None where there is none."""
        ...

    def limit(self, sequence: Sequence) -> int | None:
        """The most guesses; None for no limit."""
        ...

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many guesses of each sequence, all of which have a `record`."""
        ...

    def forget(self, number: int) -> None:
        """The sequence of this number has ended."""
        ...


class Speculator:
    """Guesses of running sequences: as many as pay by what was right before.

    Where none is expected to pay, one is tried now and then, so that a change is noticed: for `TRIALS` of the cost of
    the steps. `guesses`: the most of a sequence in one step.
    """

    def __init__(self, proposer: Proposer, guesses: int, costs: Costs):
        self.proposer, self.guesses, self.costs = proposer, guesses, costs
        self._records: dict[int, Record] = {}  # of the guesses that are being checked
        self._spent = self._tried = 0.0

    def guess(self, sequences: list[Sequence], slots: int, room: int) -> list[list[int]]:
        """Guesses of each sequence, for a step over so many slots, which takes up to `room` of a sequence."""
        wanted: list[tuple[Sequence, int]] = []
        records: list[Record] = []
        for sequence in sequences:
            limit = min(self.guesses, room, sequence.room - sequence.new - 1)
            record = self.proposer.record(sequence) if limit > 0 else None
            if record is not None:
                most = self.proposer.limit(sequence)
                limit = min(limit, record.most)
                wanted.append((sequence, limit if most is None else min(limit, most)))
                records.append(record)
        count, once = 0, self.costs.of(slots, 0)
        if wanted:
            rates, limits = [record.rate for record in records], [limit for _, limit in wanted]
            count = best_guesses(rates, limits, len(sequences) - len(wanted), slots, self.costs)
            more = self.costs.of(slots, 1) - once
            if not count and self._tried + more <= TRIALS * self._spent:
                self._tried += more
                count = 1
        self._spent += once
        self._records = {}
        if not count:
            return [[] for _ in sequences]
        found = self.proposer.propose([(sequence, min(limit, count)) for sequence, limit in wanted])
        self._records = {each.number: record for (each, _), record in zip(wanted, records, strict=True)}
        by_number = {each.number: guesses for (each, _), guesses in zip(wanted, found, strict=True)}
        return [by_number.get(each.number, []) for each in sequences]

    def note(self, sequence: Sequence, guesses: int, right: int) -> None:
        """Of the last guesses of a sequence the first `right` were right."""
        if guesses:
            self._records[sequence.number].note(guesses, right)

    def forget(self, number: int) -> None:
        """The sequence of this number has ended."""
        self.proposer.forget(number)


def best_guesses(rates: Values[float], limits: Values[int], others: int, slots: int, costs: Costs) -> int:
    """How many guesses k of each sequence, at most its limit, bring most tokens for a step's cost; 0 for none.

    `rates`: of the sequences that have guesses. `others`: sequences that have none. `slots`: B.
    """
    tokens = float(len(rates) + others)  # which a step brings: the model's own, and the guesses that are right
    best, most = 0, MARGIN * tokens / costs.of(slots, 0)
    right, last = [1.0] * len(rates), max(limits, default=0)  # how probably a sequence's guesses so far are all right
    for guesses in range(1, last + 1):
        right = [
            chance * rate if guesses <= limit else 0.0 for chance, rate, limit in zip(right, rates, limits, strict=True)
        ]
        tokens += sum(right)
        cost = costs.of(slots, guesses)
        if tokens / cost > most:
            best, most = guesses, tokens / cost
        if tokens + sum(right) * (last - guesses) < most * cost:  # further ones bring less each, and cost more
            break
    return best
