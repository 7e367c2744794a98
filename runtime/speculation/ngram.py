"""Guesses from the sequence itself: what followed its last tokens when they occurred before.

Saxena's prompt lookup decoding and LLMA (arXiv 2304.04487) guess so. The match that a guess comes from is followed as
long as it holds, so text that is repeated is guessed from one place.
"""

from collections.abc import Sequence as Ids

from runtime.scheduling.sequence import Sequence
from runtime.speculation.record import FIRST_RATE, Record

LONGEST = 3  # tokens by which an earlier place is looked up
CLASSES = 5  # matches of so many tokens and more have one record
FIRST_RATES = {1: 0.3, 2: 0.5}  # of short matches, before their guesses were checked


class Match:
    """Where a sequence continues as it did before: `place`, an index of its ids, after `length` equal tokens."""

    def __init__(self) -> None:
        self.place = self.length = 0
        self._read = 0  # ids in the table
        self._places: dict[tuple[int, ...], int] = {}  # of up to LONGEST ids, the index after their last occurrence

    def read(self, ids: Ids[int]) -> None:
        """Take note of the ids since the last call, of which those in front are known."""
        for index in range(self._read, len(ids)):
            # the last ids themselves are not looked up: they are entered once their successor is known
            for size in range(1, min(LONGEST, index) + 1):
                self._places[tuple(ids[index - size : index])] = index
            holds = self.length and ids[self.place] == ids[index]
            self.place, self.length = (self.place + 1, self.length + 1) if holds else (0, 0)
        self._read = len(ids)
        if self.length < LONGEST:
            self._look_up(ids)

    def _look_up(self, ids: Ids[int]) -> None:
        for size in range(self.length + 1, min(LONGEST, len(ids) - 1) + 1):
            place = self._places.get(tuple(ids[-size:]))
            if place is None:  # then no longer ones occurred before either
                return
            self.place, self.length = place, size

    def guesses(self, ids: Ids[int], count: int) -> list[int]:
        """The next ids, as they followed the match; past the end of `ids` they repeat what is guessed."""
        found: list[int] = []
        for place in range(self.place, self.place + count):
            found.append(ids[place] if place < len(ids) else found[place - len(ids)])
        return found


class NgramProposer:
    """Guesses of sequences by their own tokens. Records are kept by the length of the match."""

    def __init__(self) -> None:
        self._matches: dict[int, Match] = {}
        self._records: dict[int, dict[int, Record]] = {}

    def record(self, sequence: Sequence) -> Record | None:
        """How good guesses like those that would come now have been; None where there is none."""
        match = self._matches.get(sequence.number)
        if match is None:
            match = self._matches[sequence.number] = Match()
        match.read(sequence.ids)
        if not match.length:
            return None
        records = self._records.setdefault(sequence.number, {})
        size = min(match.length, CLASSES)
        if size not in records:
            records[size] = Record(FIRST_RATES.get(size, FIRST_RATE))
        return records[size]

    def limit(self, sequence: Sequence) -> int | None:
        """The most guesses; None for no limit."""
        return None

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """So many guesses of each sequence, all of which have a `record`."""
        return [self._matches[sequence.number].guesses(sequence.ids, count) for sequence, count in wanted]

    def forget(self, number: int) -> None:
        """The sequence of this number has ended."""
        self._matches.pop(number, None)
        self._records.pop(number, None)
