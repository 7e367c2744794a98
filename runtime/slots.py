"""The slots of a loaded graph: tokens are appended to them step by step, and sequences join and leave them.

B batch (slots), S new tokens, C cache capacity, V vocabulary (of a classifier, its labels).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Session
from runtime.errors import RequestError
from runtime.host.lock import Exclusive, exclusive
from runtime.ids import as_integer, as_integers


class Slots:
    """A session with the number of tokens in each of its slots.

    `prefill` after `reset` decides the number of slots. Token ids are checked; arrays are numpy's, and those that a
    call returns belong to the caller. One thread uses it at a time: another one's call raises `RequestError` at once,
    as does any use in a process forked since it was loaded and any use after `close`.
    """

    def __init__(self, session: Session):
        self.session, self.graph = session, session.graph
        self.in_use = Exclusive()
        self._lengths = np.zeros(0, np.int64)
        self._closed = False

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each slot, (B,), int64."""
        return self._lengths.copy()

    @exclusive
    def reset(self) -> None:
        """Empty every slot."""
        self._lengths = np.zeros(0, np.int64)

    @exclusive
    def close(self) -> None:
        """Give all memory back. A second call does nothing; any other call raises `RequestError`."""
        self._closed = True
        self._lengths = np.zeros(0, np.int64)
        self.session.close()

    @exclusive
    def reserve(self, batch: int, length: int) -> None:
        """Make `batch` empty slots with memory for `length` tokens, so that they need none on the way.

        Optional: `prefill` makes slots for what it is given, and a step grows them. Raises `RequestError`.
        """
        self._check_open()
        batch, length = as_integer(batch, "the batch", 1), as_integer(length, "the length", 0)
        self.session.allocate(batch, self.bucket(length))
        self._lengths = np.zeros(batch, np.int64)

    def prefill(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> np.ndarray:
        """Append tokens to the slots: ids (B, S), right-padded, of which lengths (B,) are real (default: all).

        A slot of length 0 is idle and keeps its content; its logits mean nothing. Returns logits (B, V), float32, of
        each slot's last real token. Raises `RequestError` before anything runs where an id is no integer of the
        vocabulary or a slot would pass the artifact's length.
        """
        return self.append(ids, lengths)

    @exclusive
    def append(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None, argmax: bool = False) -> np.ndarray:
        """`prefill`; with `argmax` the ids (B,), int64, of the largest logits, -1 where logits are not finite."""
        ids = as_integers(ids, "ids", 2)
        batch, width = ids.shape
        new = np.full(batch, width) if lengths is None else as_integers(lengths, "lengths", 1)
        if new.shape != (batch,) or new.min() < 0 or new.max() > width:
            raise RequestError(f"lengths are {new.tolist()}; expected {batch} integers from 0 to {width}")
        self._check(ids, new)
        if not self._lengths.size:
            self.reserve(batch, width)
        result: np.ndarray | None = None
        done = 0
        while done < width:
            size = self._fit(width - done)
            real = np.minimum(np.maximum(new - done, 0), size)
            found = self.session.step(ids[:, done : done + size], self._lengths, real, argmax)
            self._lengths = self._lengths + real
            took = (real > 0) if argmax else (real > 0)[:, None]
            result = np.array(found) if result is None else np.where(took, found, result)
            done += size
        assert result is not None
        return result

    def decode(self, ids: npt.ArrayLike) -> np.ndarray:
        """Append one token to every slot: ids (B,) to logits (B, V), float32. Raises `RequestError`."""
        ids = as_integers(ids, "ids", 1)
        if ids.shape != self._lengths.shape:
            raise RequestError(
                f"ids have shape {ids.shape}; expected {self._lengths.shape}, one a slot, after a prefill"
            )
        return self.append(ids[:, None])

    @exclusive
    def join(self, slot: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Begin a sequence in one slot, after `reserve`; the others are neither read nor written.

        What the slot held is forgotten. Returns logits (V,), float32, of the last id. Raises `RequestError`.
        """
        slot, prompt = self._check_slot(slot), self.check_prompt(ids)
        if prompt.size > self.session.capacity:
            self.session.grow(self.bucket(prompt.size))
        self.leave(slot)
        self.session.clear_slot(slot)
        found = np.zeros((0, 0), np.float32)
        for start in range(0, prompt.size, self.session.chunk):
            chunk = prompt[start : start + self.session.chunk]
            found = self.session.step_slot(slot, chunk, self._lengths)
            self._lengths[slot] += chunk.size
        return found[-1].copy()

    @exclusive
    def leave(self, slot: int) -> None:
        """End the slot's sequence: it is idle until another joins. Raises `RequestError` for no such slot."""
        slot = self._check_slot(slot)
        self._lengths = self._lengths.copy()
        self._lengths[slot] = 0

    @property
    def held(self) -> object:
        """What the slots hold now, to be given to `check_held` later."""
        return self._lengths  # every change of a slot's length makes a new array

    def check_held(self, held: object) -> None:
        """Raise `RequestError` where a call has used the slots since they were `held`."""
        if held is not self._lengths:
            raise RequestError("another call used these slots meanwhile; finish one generation before the next begins")

    def check_prompt(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """`ids` as an array (S,). Raises `RequestError` unless they may begin a sequence."""
        if ids.size == 0 if isinstance(ids, np.ndarray) else isinstance(ids, list | tuple | range) and not ids:
            raise RequestError("the prompt is empty; expected at least one token")
        prompt = as_integers(ids, "ids", 1)
        self._check(prompt[None], np.array([prompt.size]), fresh=True)
        return prompt

    def bucket(self, length: int) -> int:
        """The smallest capacity for slots of `length` tokens."""
        return next((size for size in self.graph.capacities if size >= length), self.graph.max_length)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this engine is closed; load the artifact again")

    def _check_slot(self, slot: int) -> int:
        if not self._lengths.size:
            raise RequestError(f"slot is {str(slot)[:60]}; there are no slots yet, reserve makes them")
        return as_integer(slot, "slot", 0, self._lengths.size - 1)

    def _check(self, ids: np.ndarray, new: np.ndarray, fresh: bool = False) -> None:
        """Raise `RequestError` unless ids (B, S), of which new (B,) are real, may be appended."""
        self._check_open()
        batch = ids.shape[0]
        if batch > self.graph.max_batch:
            raise RequestError(f"the batch is {batch}; this artifact serves up to {self.graph.max_batch} slots")
        held = np.zeros(batch, np.int64) if fresh or not self._lengths.size else self._lengths
        if held.size != batch:
            raise RequestError(f"the batch is {batch}, but {held.size} slots are in use; reset the engine first")
        total = held + new
        if total.max() > self.graph.max_length:
            slot = int(total.argmax())
            raise RequestError(
                f"slot {slot} would hold {total[slot]} tokens; this artifact's capacity is {self.graph.max_length}"
            )
        if ids.min() >= 0 and ids.max() < self.graph.vocabulary:
            return
        wrong = (ids < 0) | (ids >= self.graph.vocabulary)
        wrong &= np.arange(ids.shape[1]) < new[:, None]
        for slot, at in np.argwhere(wrong):
            raise RequestError(
                f"token id {ids[slot, at]} at position {at} of slot {slot}; expected 0 to {self.graph.vocabulary - 1}"
            )

    def _fit(self, width: int) -> int:
        """How many columns of `width` the next step takes, growing the caches where a larger bucket exists.

        Padding is written too, so every slot that is not full needs room for the whole chunk. Where even the largest
        bucket has none, the chunk is cut: the slots whose tokens are done sit the rest out.
        """
        held = self._lengths[self._lengths < self.graph.max_length]
        longest = int(held.max(initial=0))
        if longest + width > self.session.capacity:
            capacity = self.bucket(longest + width)
            if capacity > self.session.capacity:
                self.session.grow(capacity)
        return max(1, min(width, self.session.capacity - longest, self.session.chunk))
