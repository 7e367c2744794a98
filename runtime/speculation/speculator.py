"""Which guesses a step checks, for the sequences of one scheduler."""

from typing import Protocol

from runtime.scheduling.sequence import Sequence
from runtime.speculation.record import Record, best_guesses, step_cost

TRIALS = 0.02  # of all steps' cost, what guesses may cost that are not expected to pay


class Proposer(Protocol):
    """Guesses how sequences go on. `cost`: what a guess costs, in steps of the model."""

    cost: float

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

    def __init__(self, proposer: Proposer, guesses: int):
        self.proposer, self.guesses = proposer, guesses
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
        cost = self.proposer.cost
        count, once = 0, step_cost(slots, 0, cost)
        if wanted:
            rates, limits = [record.rate for record in records], [limit for _, limit in wanted]
            count = best_guesses(rates, limits, len(sequences) - len(wanted), slots, cost)
            more = step_cost(slots, 1, cost) - once
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
