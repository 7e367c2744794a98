"""Guesses of a draft model: a smaller one over the same tokenizer, with slots of its own.

n slots of a step, S new tokens.
"""

from typing import cast

import numpy as np

from runtime.scheduling.sequence import Sequence
from runtime.slots import Slots
from runtime.speculation.record import Record

TOGETHER = 2  # new tokens of a sequence that are read in one step with those of others; a prompt is read alone


class DraftProposer:
    """Guesses of sequences by the argmax of a draft model, one step a guess.

    `draft`: its slots, which nothing else uses meanwhile; where something has, all is read again. `slots`: sequences at
    once.
    """

    def __init__(self, draft: Slots, slots: int):
        self.draft, self.slots = draft, slots
        self._held: object = None
        self._lengths = np.zeros(0, np.int64)
        self._read: dict[int, tuple[int, list[int]]] = {}  # by a sequence's number: its slot, and the ids in its caches
        self._records: dict[int, Record] = {}

    def record(self, sequence: Sequence) -> Record | None:
        """How good the draft's guesses of the sequence have been; None where it is too long for the draft."""
        if self.limit(sequence) < 1:
            return None
        return self._records.setdefault(sequence.number, Record())

    def limit(self, sequence: Sequence) -> int:
        """The most guesses: the ids, the guesses and one token more have room in a slot of the draft."""
        return self.draft.graph.max_length - len(sequence.ids) - TOGETHER

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """So many guesses of each sequence, or fewer where logits are not finite."""
        with self.draft.in_use:
            if self._held is None or self.draft.held is not self._held:
                self.draft.reserve(self.slots, 0)
                self._held = self.draft.held
                self._lengths = cast(np.ndarray, self._held)  # written in place, so it stays the one that is held
                self._read = {}
            found: dict[int, list[int]] = {self._catch_up(sequence): [] for sequence, _ in wanted}
            counts = dict(zip(found, (count for _, count in wanted), strict=True))
            new = {self._read[each.number][0]: self._unread(each) for each, _ in wanted}
            while new:
                chosen = self._step(new)
                new = {}
                for slot, token in chosen.items():
                    if token >= 0:
                        found[slot].append(token)
                    if token >= 0 and len(found[slot]) < counts[slot]:
                        new[slot] = [token]
            self._note_read(wanted, found)
        return list(found.values())

    def forget(self, number: int) -> None:
        """The sequence of this number has ended."""
        self._records.pop(number, None)
        if number in self._read:
            slot, _ = self._read.pop(number)
            self._lengths[slot] = 0

    def _unread(self, sequence: Sequence) -> list[int]:
        return sequence.ids[len(self._read[sequence.number][1]) :]

    def _catch_up(self, sequence: Sequence) -> int:
        """Have all but the sequence's last ids in the caches of a slot, and nothing else; returns the slot."""
        if sequence.number not in self._read:
            taken = {slot for slot, _ in self._read.values()}
            slot = next(slot for slot in range(self.slots) if slot not in taken)
            self._lengths[slot] = 0
            self._read[sequence.number] = slot, []
        slot, read = self._read[sequence.number]
        same = min(len(read), len(sequence.ids) - 1)  # its last id is to be read: guesses follow it
        while read[:same] != sequence.ids[:same]:
            same -= 1
        del read[same:]
        self._lengths[slot] = same
        while len(left := self._unread(sequence)) > TOGETHER:
            piece = left[: min(len(left) - 1, self.draft.session.chunk)]
            self._make_room(int(self._lengths[slot]) + len(piece))
            self.draft.session.step_slot(slot, np.array(piece), self._lengths, True)
            self._lengths[slot] += len(piece)
            read += piece
        return slot

    def _step(self, new: dict[int, list[int]]) -> dict[int, int]:
        """Read new ids of some slots; the ids that follow, -1 where logits are not finite."""
        count, length = max(new) + 1, max(map(len, new.values()))
        ids, real = np.zeros((count, length), np.int64), np.zeros(count, np.int64)
        for slot, given in new.items():
            ids[slot, : len(given)], real[slot] = given, len(given)
        self._make_room(int(self._lengths[:count].max()) + length)
        found = self.draft.session.step(ids, self._lengths, real, True)
        self._lengths[:count] += real
        return {slot: int(found[slot]) for slot in new}

    def _note_read(self, wanted: list[tuple[Sequence, int]], found: dict[int, list[int]]) -> None:
        """Keep which ids are in the caches now: all but the last guess of each sequence."""
        for sequence, _ in wanted:
            slot, read = self._read[sequence.number]
            read += (self._unread(sequence) + found[slot])[: int(self._lengths[slot]) - len(read)]

    def _make_room(self, tokens: int) -> None:
        if tokens > self.draft.session.capacity:
            self.draft.session.grow(self.draft.bucket(tokens))
