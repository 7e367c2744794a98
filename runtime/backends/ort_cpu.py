"""The ONNX Runtime backend: one graph, and caches that it writes in place.

B batch, S new tokens, R rows of logits, C cache capacity, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from math import gcd, lcm, prod
from typing import Any

import numpy as np

from runtime.artifact.manifest import ELEMENTS, LOGITS_INDEX, Artifact, State
from runtime.backends.arrays import STORAGE, argmax_ids, last_index, last_rows, rows_index, state_bytes, widened
from runtime.backends.base import Options
from runtime.backends.eviction import Eviction
from runtime.backends.ort import MISSING, first_line, open_session, session_options
from runtime.errors import ArtifactError
from runtime.host.budget import Budget
from runtime.host.denormals import flushed_denormals
from runtime.host.memory import check_memory, release, release_files, return_freed, use_huge_pages

ALIGNMENT = 64  # bytes, a line of a processor's cache
SHARED = 16  # rows of logits of a slot up to which all steps write into one buffer


@dataclass
class Bound:
    """What is bound to the graph for steps of some slots. The caches are bound once, ids and logits for each shape.

    `inputs`: the buffers of all inputs but the caches, in the graph's order. `shape`: the S tokens and R rows of logits
    that `inputs` and `logits` are of; (0, 0) before any are bound.
    """

    binding: Any
    inputs: list[np.ndarray]
    shape: tuple[int, int]
    logits: np.ndarray


class CpuBackend:
    """ONNX Runtime on the CPU: what every artifact can run on."""

    name = "cpu"
    has_devices = False

    def missing(self, artifact: Artifact) -> str | None:
        return None if find_spec("onnxruntime") else MISSING

    def open(self, artifact: Artifact, options: Options) -> "OnnxSession":
        return OnnxSession(artifact, options.threads, options.budget)


class OnnxSession:
    """A loaded graph with static caches for B slots of C tokens.

    Each cache is one buffer bound as the graph's input and as its output, so a step writes its new rows where they
    belong and copies nothing. Attention reads a cache to its end: rows lie as close as the longest slot allows and move
    apart, in memory that is there for all of them, as it grows. What a slot gets does not turn on that, to the bit:
    capacities are multiples of 64 rows, more than a kernel takes at once, and hidden rows add zeros. `threads` defaults
    to ONNX Runtime's choice, the physical cores.
    """

    device_name = "CPU"

    def __init__(self, artifact: Artifact, threads: int | None = None, budget: Budget | None = None):
        self.artifact, self.graph = artifact, artifact.graph
        path = artifact.path / self.graph.cpu_file
        try:
            self.session: Any = cpu_session(artifact.model(self.graph.cpu_file), threads, budget)
        except ArtifactError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions share no narrower base
            raise ArtifactError(f"{path}: ONNX Runtime refuses it: {first_line(error)}") from error
        release_files(artifact.path.resolve())
        return_freed()
        self.chunk = self.graph.chunk
        self.most_rows = self.graph.most_rows
        self.batch = self.capacity = self.reserved = 0
        self.eviction = Eviction(self.graph, 0)
        self.memory: list[np.ndarray] = []  # one a state, flat, for `reserved` tokens
        self.caches: list[np.ndarray] = []  # the same in the states' shapes, for `capacity` of them
        self._logits = np.zeros(0, STORAGE[self.graph.dtype])  # the shared buffer
        self._bound: dict[tuple[int, int], Bound] = {}  # by the slots of a step, from the first to before the end

    def allocate(self, batch: int, capacity: int) -> None:
        """Empty caches for `batch` slots of `capacity` tokens. Raises `RequestError` where memory is short."""
        if (batch, capacity) == (self.batch, self.reserved):
            self.clear()
        else:
            rows = self.graph.rows(capacity)
            self._check_memory(self.graph.states, batch, rows, freed=sum(flat.nbytes for flat in self.memory))
            self.eviction = Eviction(self.graph, batch)
            self.batch, self.reserved = batch, capacity
            self.memory, self.caches, self._bound = [], [], {}  # frees the old caches before new ones are made
            self.memory = _buffers(self.graph.states, batch, rows)
        self._lay_out(self.graph.capacities[0])

    def grow(self, capacity: int) -> None:
        """Caches of a larger capacity with the same content: one copy. Raises `RequestError` where memory is short."""
        old, new = self.graph.rows(self.capacity), self.graph.rows(capacity)
        if new > self.graph.rows(self.reserved):
            self._check_memory(self.graph.states, self.batch, new)
            for index, flat in enumerate(_buffers(self.graph.states, self.batch, new)):
                held = self.memory[index]
                flat[: held.size] = held
                self.memory[index] = flat  # before `held` is released: Ctrl-C in between loses nothing
                release(held)  # else the old and the new caches are in memory at once
        self.reserved = max(capacity, self.reserved)
        if new == old:
            self.capacity = capacity
            return
        for state, flat in zip(self.graph.states, self.memory, strict=True):
            if "capacity" in state.shape:
                shape, axis = state.sized(self.batch, old), state.shape.index("capacity")
                row = prod(shape[axis + 1 :])
                _move_apart(flat, prod(shape[:axis]), old * row, new * row)
        self._lay_out(capacity)

    def shrink(self, capacity: int) -> None:
        """Caches of a smaller capacity, which no slot's content exceeds: one copy. Their memory stays reserved."""
        old, new = self.graph.rows(self.capacity), self.graph.rows(capacity)
        if new < old:
            for state, flat in zip(self.graph.states, self.memory, strict=True):
                if "capacity" in state.shape:
                    shape, axis = state.sized(self.batch, new), state.shape.index("capacity")
                    row = prod(shape[axis + 1 :])
                    _move_together(flat, prod(shape[:axis]), old * row, new * row)
            self._lay_out(capacity)
        self.capacity = capacity

    def _check_memory(self, states: Sequence[State], batch: int, rows: int, freed: int = 0) -> None:
        size = sum(state_bytes(state, batch, rows) for state in states)
        check_memory(size, f"caches for {batch} slots of {rows} tokens", freed)

    def clear(self) -> None:
        """Zero the caches. Rows past a slot's length are masked, but a NaN left there would pass through the mask."""
        for flat in self.memory:
            flat.fill(0)

    def clear_slot(self, slot: int) -> None:
        """Zero one slot's caches."""
        for cache in self.caches:
            cache[slot] = 0

    def step(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, argmax: bool = False
    ) -> np.ndarray:
        """One chunk of the first n slots: input_ids (n, S), sequence_lengths (n); cache_lengths (B) of all; int64.

        Returns the logits (n, V), float32, of each slot's last real token: a buffer that the next step overwrites.
        With `argmax`, only the ids (n,), int64, of the largest of them, -1 where logits are not finite.
        """
        return self.step_rows(input_ids, cache_lengths, sequence_lengths, 1, argmax)[:, 0]

    def step_rows(
        self, input_ids: np.ndarray, cache_lengths: np.ndarray, sequence_lengths: np.ndarray, rows: int,
        argmax: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """`step`, with the logits (n, R, V) of each slot's last R = `rows` real tokens, or their ids (n, R)."""
        count, length = input_ids.shape
        lengths = self.eviction.make_room(cache_lengths[:count], length, self._part)
        found = self._run(0, count, rows, input_ids, lengths[0], sequence_lengths, *lengths[1:])
        return argmax_ids(found) if argmax else found

    def step_slot(
        self, slot: int, input_ids: np.ndarray, cache_lengths: np.ndarray, argmax: bool = False, rows: int = 1
    ) -> np.ndarray:
        """One chunk, input_ids (S,), for one slot and its part of the caches alone.

        Returns the logits (R, V) of the last R = `rows` ids, or with `argmax` the ids (R,), as `step`.
        """
        lengths = self.eviction.make_room(cache_lengths[slot : slot + 1], input_ids.size, self._part, slot)
        found = self._run(slot, slot + 1, rows, input_ids[None], lengths[0], np.array([input_ids.size]), *lengths[1:])
        return argmax_ids(found[0]) if argmax else found[0]

    @property
    def row_multiple(self) -> int:
        """A step of a multiple of this many slots gives each of them the same bits, whatever their number and order.

        Two kernels of ONNX Runtime compute the rows at the end of a batch in another way than those before. int8
        products take rows in pairs. Softplus, on the biases (n, heads) of n rows, takes four numbers at once.
        """
        heads = {state.shape[1] for state in self.graph.states if state.input.endswith(".bias")}
        packs = [4 // gcd(4, int(count)) for count in heads]
        return lcm(2 if self.graph.quantization == "int8" else 1, *packs)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the content of `source`, a slot of `tokens` tokens."""
        rows = slice(0, tokens - int(self.eviction.evicted[source]))
        for state, cache in zip(self.graph.states, self.caches, strict=True):
            part = rows_index(state, rows)
            cache[target][part] = cache[source][part]
        self.eviction.evicted[target] = self.eviction.evicted[source]

    def read_rows(self, slot: int, start: int, stop: int) -> list[np.ndarray] | None:
        """The cache rows of tokens `start` to `stop` of a slot that holds `stop` tokens, and its states without rows.

        One array a state, (K, rows, size) or as the state is, the caller's own. None where some were evicted.
        """
        if self.eviction.evicted[slot]:
            return None
        parts = [rows_index(state, slice(start, stop)) for state in self.graph.states]
        return [cache[slot][part].copy() for part, cache in zip(parts, self.caches, strict=True)]

    def write_rows(self, slot: int, start: int, rows: list[np.ndarray]) -> None:
        """Put what `read_rows` gave for tokens `start` and on into a slot that holds `start` tokens."""
        for state, cache, part in zip(self.graph.states, self.caches, rows, strict=True):
            cache[slot][rows_index(state, slice(start, start + part.shape[1]))] = part
        self.eviction.evicted[slot] = 0

    def close(self) -> None:
        """Give all memory back; the session cannot be used again."""
        self.session, self._bound, self._logits = None, {}, self._logits[:0].copy()
        self.memory, self.caches, self.batch, self.capacity, self.reserved = [], [], 0, 0, 0
        return_freed()

    def _part(self, slot: int, state: State) -> nullcontext[np.ndarray]:
        return nullcontext(self.caches[self.graph.states.index(state)][slot])

    def _run(self, first: int, end: int, rows: int, *values: np.ndarray) -> np.ndarray:
        """The logits (slots, R, V), float32, of a step of the slots from `first` to `end`, R = `rows`: a buffer.

        `values`: what the graph's inputs are but for `logits_index`, in their order.
        """
        shape = values[0].shape[1], rows
        bound = self._bound.get((first, end)) or self._bind_caches(first, end)
        if bound.shape != shape:
            self._bind_shape(bound, end - first, *shape)
        for buffer, value in zip(bound.inputs, values, strict=False):
            buffer[...] = value
        if self.graph.indexed and shape[0] > 1:  # of one token, it is the zero that the buffer holds
            bound.inputs[-1][...] = last_index(values[2], rows)
        try:
            with flushed_denormals():
                self.session.run_with_iobinding(bound.binding)
        except Exception as error:  # as above
            raise ArtifactError(f"{self.artifact.path}: a step of its graph failed: {first_line(error)}") from error
        logits = last_rows(bound.logits, values[2], rows) if self.graph.logits == "all" else bound.logits
        return widened(logits, self.graph.dtype).astype(np.float32, copy=False)

    def _bind_caches(self, first: int, end: int) -> Bound:
        """Bind the caches of the slots from `first` to `end`, and the inputs whose shapes no step changes."""
        binding = self.session.io_binding()
        for state, cache in zip(self.graph.states, self.caches, strict=True):
            _bind(binding.bind_input, state.input, cache[first:end], ELEMENTS[state.dtype])
            _bind(binding.bind_output, state.output, cache[first:end], ELEMENTS[state.dtype])
        inputs = [np.zeros(end - first, np.int64) for _ in self.graph.inputs]
        for name, buffer in zip(self.graph.inputs, inputs, strict=True):
            if name not in ("input_ids", LOGITS_INDEX):
                _bind(binding.bind_input, name, buffer, ELEMENTS["int64"])
        bound = self._bound[first, end] = Bound(binding, inputs, (0, 0), self._logits)
        return bound

    def _bind_shape(self, bound: Bound, batch: int, length: int, rows: int) -> None:
        """Bind new ids, rows' indices and logits, for S = `length` tokens and R = `rows` rows of B = `batch` slots."""
        bound.shape = 0, 0  # until all are bound
        sizes = {"input_ids": length, LOGITS_INDEX: rows}
        for index, name in enumerate(self.graph.inputs):
            if name in sizes:
                bound.inputs[index] = np.zeros((batch, sizes[name]), np.int64)
                _bind(bound.binding.bind_input, name, bound.inputs[index], ELEMENTS["int64"])
        written = length if self.graph.logits == "all" else rows
        shape = batch, written, self.graph.logits_width
        flat, size = self._logits, prod(shape)
        if written > SHARED or flat.size < size:
            flat = np.zeros(size, flat.dtype)
        if written <= SHARED:
            self._logits = flat
        bound.logits = flat[:size].reshape(shape)
        _bind(bound.binding.bind_output, "logits", bound.logits, ELEMENTS[self.graph.dtype])
        bound.shape = length, rows

    def _lay_out(self, capacity: int) -> None:
        shapes = [state.sized(self.batch, self.graph.rows(capacity)) for state in self.graph.states]
        self.caches = [flat[: prod(s)].reshape(s) for flat, s in zip(self.memory, shapes, strict=True)]
        self.capacity, self._bound = capacity, {}


def cpu_session(model: bytes, threads: int | None, budget: Budget | None = None) -> Any:
    """ONNX Runtime's session on the CPU with `threads`, None for its own choice; its weights move into huge pages."""
    options = session_options(threads)
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in its threads; see `flushed_denormals`

    def create() -> Any:
        with flushed_denormals():  # also restores what ONNX Runtime sets here, in the first session of a process
            return open_session(model, options, ["CPUExecutionProvider"])

    session = (budget or Budget()).run(create, cancel=lambda: options.set_load_cancellation_flag(True))
    use_huge_pages()
    return session


def _move_apart(flat: np.ndarray, heads: int, old: int, new: int) -> None:
    """Of the `heads` parts that begin every `old` elements, make parts of `new` that begin as the old and end in 0."""
    for head in reversed(range(heads)):  # the last first: a part lands behind those that still wait
        flat[head * new : head * new + old] = flat[head * old : (head + 1) * old]
        flat[head * new + old : (head + 1) * new] = 0


def _move_together(flat: np.ndarray, heads: int, old: int, new: int) -> None:
    """Of the `heads` parts that begin every `old` elements, have the first `new` elements begin every `new`."""
    for head in range(heads):
        flat[head * new : (head + 1) * new] = flat[head * old : head * old + new]


def _bind(bind: Any, name: str, buffer: np.ndarray, element: int) -> None:
    bind(name, "cpu", 0, element, buffer.shape, buffer.ctypes.data)


def _buffers(states: Sequence[State], batch: int, rows: int) -> list[np.ndarray]:
    """Zeros for each state, flat, in one piece of memory: numpy has Linux put those of several MB into huge pages.

    In small ones, every eighth step or so writes to a page of each head that is new, and a page costs a microsecond.
    """
    sizes = [state_bytes(state, batch, rows) for state in states]
    starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    memory = np.zeros(starts[-1], np.uint8)
    return [
        memory[start : start + size].view(STORAGE[state.dtype])
        for state, start, size in zip(states, starts, sizes, strict=False)
    ]
