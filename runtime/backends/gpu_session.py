"""What the GPU backends share: caches and buffers on the device, one upload and one download a step.

B batch, S new tokens, R rows of logits, C cache capacity, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from runtime.artifact.manifest import Artifact, State
from runtime.backends.arrays import STORAGE, argmax_ids, last_index, last_rows, rows_index, state_bytes, widened
from runtime.backends.cuda import Device
from runtime.backends.eviction import Eviction
from runtime.errors import RequestError

INT64 = 8  # bytes
ROWS = 16  # of logits that a step of an indexed graph gives at most, which bounds their buffer


class GpuSession:
    """Static caches for B slots of C tokens in a GPU's memory; how a step runs is the subclass's.

    The caches are allocated once for a batch and stay where they are, so a captured step can be replayed. Inputs go up
    from page-locked host memory. Raises `RequestError` where memory is short.
    """

    def __init__(self, artifact: Artifact, device: Device, max_batch: int, capacities: tuple[int, ...], chunk: int):
        self.artifact, self.device, self.chunk = artifact, device, chunk
        self.device_name = device.name
        self.graph = replace(artifact.graph, max_batch=max_batch, max_length=capacities[-1], capacities=capacities)
        self.batch = self.capacity = 0
        self.eviction = Eviction(self.graph, 0)
        self.lengths = len(self.graph.inputs) - 1 - self.graph.indexed  # inputs of one number a slot
        self.most_rows = chunk if self.graph.logits == "all" else min(chunk, ROWS, self.graph.most_rows)
        self.addresses: dict[str, int] = {}
        self.host: dict[str, np.ndarray] = {}

    def allocate(self, batch: int, capacity: int) -> None:
        """Empty caches for `batch` slots of `capacity` tokens, and the buffers of a step."""
        if (batch, capacity) == (self.batch, self.capacity):
            self.clear()
            return
        if batch > self.graph.max_batch or capacity > self.graph.max_length:
            raise RequestError(
                f"{batch} slots of {capacity} tokens are asked for; this engine has up to {self.graph.max_batch} "
                f"of {self.graph.max_length}; build a larger one"
            )
        self.release()
        try:
            for name, size in self.sizes(batch, capacity).items():
                self.addresses[name] = self.device.allocate(size, f"{name} for {batch} slots of {capacity} tokens")
            rows = self.most_rows
            for name, shape, dtype in (
                ("inputs", (batch * self._columns(self.chunk, rows),), np.int64),
                ("logits", (batch * rows * self.graph.logits_width,), STORAGE[self.graph.dtype]),
                ("next_ids", (batch * rows,), np.int64),
            ):
                self.host[name] = self.device.host_array(shape, dtype)
        except RequestError:
            self.release()
            raise
        self.batch, self.capacity = batch, capacity
        self.eviction = Eviction(self.graph, batch)
        self.clear()

    def grow(self, capacity: int) -> None:
        """Caches of a larger capacity with the same content."""
        raise NotImplementedError

    def shrink(self, capacity: int) -> None:
        """Nothing: the caches stay as they were made."""

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        """Bytes of every buffer on the device, by name."""
        rows = batch * self.most_rows
        width = np.dtype(STORAGE[self.graph.dtype]).itemsize
        sizes = {state.input: self.state_bytes(state, batch, capacity) for state in self.graph.states}
        sizes["inputs"] = batch * self._columns(self.chunk, self.most_rows) * INT64
        sizes["logits"], sizes["next_ids"] = rows * self.graph.logits_width * width, rows * INT64
        return sizes

    def _columns(self, length: int, rows: int) -> int:
        """The numbers of a slot in the graph's inputs, in a step of S = `length` tokens with R = `rows` of logits."""
        return length + self.lengths + (rows if self.graph.indexed else 0)

    def state_bytes(self, state: State, batch: int, capacity: int) -> int:
        return state_bytes(state, batch, self.graph.rows(capacity))

    def clear(self) -> None:
        """Zero the caches. Rows past a slot's length are masked, but a NaN left there would pass through the mask."""
        for state in self.graph.states:
            self.device.zero(self.addresses[state.input], self.state_bytes(state, self.batch, self.capacity))

    def clear_slot(self, slot: int) -> None:
        """Zero one slot's caches."""
        for state in self.graph.states:
            size = self.state_bytes(state, 1, self.capacity)
            self.device.zero(self.addresses[state.input] + slot * size, size)

    @contextmanager
    def _part(self, slot: int, state: State) -> Iterator[np.ndarray]:
        """A slot's part of a cache in host memory; put back when the block ends."""
        part = self.device.host_array(state.sized(1, self.graph.rows(self.capacity))[1:], STORAGE[state.dtype])
        address = self.addresses[state.input] + slot * part.nbytes
        try:
            self.device.download(part, address)
            self.device.synchronize()
            yield part
            self.device.upload(address, part)
            self.device.synchronize()  # before the array goes
        finally:
            self.device.free_host(part)

    def step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, argmax: bool = False
    ) -> np.ndarray:
        """One chunk of the first n slots: input_ids (n, S), sequence_lengths (n); cache_lengths (B) of all; int64.

        The other slots are computed too, as idle ones. Returns the logits (n, V), float32, of each slot's last real
        token, or, where only the `argmax` tokens are asked for, their ids (n,), int64, -1 where logits are not finite:
        then no logit leaves the device.
        """
        return self.step_rows(input_ids, cache_lengths, sequence_lengths, 1, argmax)[:, 0]

    def step_rows(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, rows: int,
        argmax: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """`step`, with the logits (n, R, V) of each slot's last R = `rows` real tokens, or their ids (n, R)."""
        count = len(input_ids)
        if count < self.batch:
            idle = self.batch - count
            input_ids, sequence_lengths = np.pad(input_ids, ((0, idle), (0, 0))), np.pad(sequence_lengths, (0, idle))
        return self._step(input_ids, cache_lengths, sequence_lengths, rows, argmax)[:count]

    def _step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, rows: int, argmax: bool
    ) -> np.ndarray:
        """One chunk of all slots: the argmax ids (B, R), or the logits (B, R, V)."""
        batch, length = input_ids.shape
        if batch != self.batch or length > self.chunk:
            raise RequestError(
                f"a step of {batch} slots and {length} tokens is asked for; there are {self.batch} slots, and a step "
                f"takes up to {self.chunk} tokens"
            )
        rows_taken, *evicted = self.eviction.make_room(cache_lengths, length, self._part)
        index = [last_index(sequence_lengths, rows).reshape(-1)] if self.graph.indexed else []
        held = np.concatenate([input_ids.reshape(-1), rows_taken, sequence_lengths, *evicted, *index])
        self.host["inputs"][: held.size] = held
        self.execute(length, rows)
        given = length if self.graph.logits == "all" else rows
        if argmax and self.has_next_ids:
            self.device.synchronize()
            ids = self.host["next_ids"][: batch * given].reshape(batch, given, 1)
            return self._last(ids, sequence_lengths, rows)[..., 0].copy()
        logits = self.host["logits"][: batch * given * self.graph.logits_width].reshape(batch, given, -1)
        self.device.download(logits, self.addresses["logits"])
        self.device.synchronize()
        found = widened(self._last(logits, sequence_lengths, rows), self.graph.dtype).astype(np.float32, copy=False)
        return argmax_ids(found) if argmax else found

    def _last(self, found: np.ndarray, sequence_lengths: np.ndarray, rows: int) -> np.ndarray:
        """Of what the graph gives of each token, (B, S, n), the last rows (B, R, n); others have chosen already."""
        return last_rows(found, sequence_lengths, rows) if self.graph.logits == "all" else found

    def step_slot(
        self, slot: int, input_ids: np.ndarray, cache_lengths: np.ndarray, argmax: bool = False, rows: int = 1
    ) -> np.ndarray:
        """One chunk, input_ids (S,), for one slot while the others sit it out.

        Returns the logits (R, V) of the last R = `rows` ids, or with `argmax` the ids (R,), as `step`.
        Padding is written behind what the others hold, so the chunk is cut where one of them has no room for it.
        """
        lengths = cache_lengths.copy()
        others = np.delete(lengths, slot)
        room = self.capacity - int(others[others < self.capacity].max(initial=0))
        found: list[np.ndarray] = []
        for start in range(0, input_ids.size, room):
            chunk = input_ids[start : start + room]
            ids, new = np.zeros((self.batch, chunk.size), np.int64), np.zeros(self.batch, np.int64)
            ids[slot], new[slot] = chunk, chunk.size
            found.append(self._step(ids, lengths, new, min(rows, chunk.size), argmax)[slot].copy())
            lengths = lengths + new
        return np.concatenate(found)[-rows:]

    row_multiple = 1  # a step always computes all slots

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the content of `source`, a slot of `tokens` tokens."""
        for state in self.graph.states:
            size, start = self.state_bytes(state, 1, self.capacity), self.addresses[state.input]
            self.device.copy(start + target * size, start + source * size, size)
        self.eviction.evicted[target] = self.eviction.evicted[source]

    def read_rows(self, slot: int, start: int, stop: int) -> list[np.ndarray] | None:
        """The cache rows of tokens `start` to `stop` of a slot that holds `stop` tokens, and its states without rows.

        One array a state, (K, rows, size) or as the state is, in host memory. None where some were evicted.
        """
        if self.eviction.evicted[slot]:
            return None
        found = []
        for state in self.graph.states:
            with self._part(slot, state) as part:
                found.append(part[rows_index(state, slice(start, stop))].copy())
        return found

    def write_rows(self, slot: int, start: int, rows: list[np.ndarray]) -> None:
        """Put what `read_rows` gave for tokens `start` and on into a slot that holds `start` tokens."""
        for state, given in zip(self.graph.states, rows, strict=True):
            with self._part(slot, state) as part:
                part[rows_index(state, slice(start, start + given.shape[1]))] = given
        self.eviction.evicted[slot] = 0

    has_next_ids = False

    def execute(self, length: int, rows: int) -> None:
        """Put a step of S = `length` tokens on the device: upload the inputs, run, and leave R = `rows` of logits."""
        raise NotImplementedError

    def upload_inputs(self, length: int, rows: int) -> None:
        size = self.batch * self._columns(length, rows)
        self.device.upload(self.addresses["inputs"], self.host["inputs"][:size])

    def input_bindings(self, length: int, rows: int) -> list[tuple[tuple[int, ...], int]]:
        """Shape and address of each of the graph's inputs, which lie behind each other."""
        start, batch = self.addresses["inputs"], self.batch
        lengths = [((batch,), start + batch * (length + index) * INT64) for index in range(self.lengths)]
        chosen = [((batch, rows), start + batch * (length + self.lengths) * INT64)] if self.graph.indexed else []
        return [((batch, length), start), *lengths, *chosen]

    def release(self) -> None:
        """Free the caches and the buffers of a step; `allocate` makes others."""
        for address in self.addresses.values():
            self.device.free(address)
        for array in self.host.values():
            self.device.free_host(array)
        self.addresses, self.host, self.batch, self.capacity = {}, {}, 0, 0

    def close(self) -> None:
        """Give all memory back; the session cannot be used again."""
        self.release()
