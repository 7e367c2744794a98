"""The decode loop over a loaded artifact: prefill, decode, generate; or, of a classifier, classify.

B batch (slots), S new tokens, C cache capacity, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.artifact.integrity import open_artifact
from runtime.artifact.manifest import Artifact
from runtime.backends.base import Options, Session
from runtime.backends.registry import AUTO, check_backend, choose_backend
from runtime.errors import ArtifactError, RequestError
from runtime.host.lock import Exclusive, exclusive
from runtime.text.labels import CONFIG, label_names
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import encode, load_tokenizer, pieces, until


def load(
    directory: str | PathLike[str],
    backend: str = AUTO,
    *,
    device: int | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
    public_key: str | PathLike[str] | bytes | None = None,
) -> "Engine":
    """Load an artifact directory.

    `backend`: "cpu" (ONNX Runtime), "cuda" and "ort-tensorrt" (ONNX Runtime on a GPU), "tensorrt" (an engine in the
    artifact), or "auto": the first in `runtime.backends.registry.BACKENDS` for which nothing is missing. A backend
    asked for by name is used, or refused with what is missing. `device`: the index of the GPU, 0 for the first; refused
    with a backend that has none. `threads`: threads of the CPU (default: the physical cores). `public_key`: an Ed25519
    key's PEM file or its bytes; only what its holder signed is loaded.

    Raises `ArtifactError` for a directory that is missing, damaged, not verified or not signed and for an engine that
    does not fit the GPU; `RequestError` for a backend that is unknown or cannot run here and for other wrong arguments.
    """
    check_backend(backend)
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; expected at least 1")
    if device is not None and device < 0:
        raise RequestError(f"device is {device}; expected 0 or more")
    with open_artifact(Path(directory), allow_unverified, public_key) as artifact:
        session = choose_backend(artifact, backend, device).open(artifact, Options(threads, device or 0))
    return Engine(artifact, session)


class Engine:
    """A model that is ready to run, with a slot for each sequence of a batch.

    `prefill` after `reset` decides the number of slots. Token ids are checked; arrays are numpy's. One thread uses it
    at a time: another one's call raises `RequestError` at once, as does a stream whose slot was used meanwhile, and
    any use in a process forked since it was loaded. `labels` are a classifier's, by name; a language model has none.
    """

    def __init__(self, artifact: Artifact, session: Session):
        self.artifact, self.graph, self.session = artifact, session.graph, session
        self.tokenizer = load_tokenizer(artifact)
        self.end_ids = _end_ids(artifact)
        self.labels = label_names(artifact)
        padding = artifact.read_json(CONFIG).get("pad_token_id")
        self._padding = padding if isinstance(padding, int) else -1  # which is no id
        self.in_use = Exclusive()
        self._lengths = np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each slot, (B,), int64."""
        return self._lengths.copy()

    @exclusive
    def reset(self) -> None:
        """Empty every slot."""
        self._lengths = np.zeros(0, np.int64)

    @exclusive
    def reserve(self, batch: int, length: int) -> None:
        """Make `batch` empty slots with memory for `length` tokens, so that they need none on the way.

        Optional: `prefill` makes slots for what it is given, and a step grows them.
        """
        self.session.allocate(batch, self.bucket(length))
        self._lengths = np.zeros(batch, np.int64)

    @exclusive
    def prefill(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> np.ndarray:
        """Append tokens to the slots: ids (B, S), right-padded, of which lengths (B,) are real (default: all).

        A slot of length 0 is idle and keeps its content; its logits mean nothing. Returns logits (B, V), float32, of
        each slot's last real token, in a buffer that the next call may overwrite. Raises `RequestError` before
        anything runs where an id is outside the vocabulary or a slot would pass the artifact's length.
        """
        return self.append(ids, lengths)

    @exclusive
    def append(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None, argmax: bool = False) -> np.ndarray:
        """`prefill`, or the `argmax` ids (B,) in place of the logits, -1 where those are not finite."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise RequestError(f"ids are {ids.dtype} of shape {ids.shape}; expected integers (B, S), neither of them 0")
        batch, width = ids.shape
        new = np.full(batch, width) if lengths is None else np.asarray(lengths)
        if new.shape != (batch,) or new.dtype.kind not in "iu" or new.min() < 0 or new.max() > width:
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
            if done == 0 and size == width:
                return found
            took = (real > 0) if argmax else (real > 0)[:, None]
            result = found.copy() if result is None else np.where(took, found, result)
            done += size
        assert result is not None
        return result

    def decode(self, ids: npt.ArrayLike) -> np.ndarray:
        """Append one token to every slot: ids (B,) to logits (B, V), float32, in a buffer the next call overwrites."""
        ids = np.asarray(ids)
        if ids.shape != self._lengths.shape or not ids.size:
            raise RequestError(
                f"ids have shape {ids.shape}; expected {self._lengths.shape}, one a slot, after a prefill"
            )
        return self.prefill(ids[:, None])

    @exclusive
    def join(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """Begin a sequence in one slot, after `reserve`; the others are neither read nor written.

        What the slot held is forgotten. Returns logits (V,), float32, of the last id. Raises `RequestError`.
        """
        if not 0 <= slot < self._lengths.size:
            raise RequestError(f"slot is {slot}; there are {self._lengths.size}, made by reserve")
        self.check_prompt(ids)
        if len(ids) > self.session.capacity:
            self.session.grow(self.bucket(len(ids)))
        self.leave(slot)
        self.session.clear_slot(slot)
        found = np.zeros(0, np.float32)
        for start in range(0, len(ids), self.session.chunk):
            chunk = np.asarray(ids[start : start + self.session.chunk])
            found = self.session.step_slot(slot, chunk, self._lengths)[-1]
            self._lengths[slot] += len(chunk)
        return found

    @exclusive
    def leave(self, slot: int) -> None:
        """End the slot's sequence: it is idle until another joins."""
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

    def check_task(self, classifies: bool) -> None:
        """Raise `RequestError` where this is a language model and a classifier is asked for, or the reverse."""
        if classifies and not self.labels:
            raise RequestError(f"{self.artifact.path}: is a language model, which has no labels; use generate")
        if not classifies and self.labels:
            raise RequestError(f"{self.artifact.path}: is a classifier, which writes no text; use classify")

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raise `RequestError` unless `ids` may begin a sequence."""
        if not len(ids):
            raise RequestError("the prompt is empty; expected at least one token")
        self._check(np.asarray(ids)[None], np.array([len(ids)]), fresh=True)

    def generate_ids(
        self, ids: Sequence[int], max_new_tokens: int = 128, *, stop_ids: Sequence[int] = (), **sampling: Any
    ) -> list[int]:
        """Ids to follow `ids`; see `stream_ids`."""
        return list(self.stream_ids(ids, max_new_tokens, stop_ids=stop_ids, **sampling))

    def stream_ids(
        self, ids: Sequence[int], max_new_tokens: int = 128, *, stop_ids: Sequence[int] = (), **sampling: Any
    ) -> Iterator[int]:
        """Ids to follow `ids`, one by one, in an engine that is reset for them.

        It ends after `max_new_tokens`, before an end-of-sequence id or one of `stop_ids`, or when the slot is full.
        `sampling`: the fields of `runtime.text.sampling.Sampling`. Raises `RequestError`.
        """
        self.check_task(classifies=False)
        sampler = Sampler(Sampling(**sampling))
        if max_new_tokens < 0:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
        self.check_prompt(ids)
        return self._stream(list(ids), max_new_tokens, {*self.end_ids, *stop_ids}, sampler)

    def _stream(self, seen: list[int], max_new_tokens: int, ends: set[int], sampler: Sampler) -> Iterator[int]:
        room = min(max_new_tokens, self.graph.max_length - len(seen) + 1)
        if room < 1:
            return
        held, new = None, seen
        for _ in range(room):
            with self.in_use:  # until the token is chosen: the next step overwrites the logits
                if held is None:
                    self.reserve(1, min(len(seen) + room - 1, self.graph.max_length))
                else:
                    self.check_held(held)
                # a greedy choice is made where the logits are
                found = self.append(np.array([new]), argmax=sampler.sampling.greedy)
                held = self.held
                if not (found[0] >= 0 if sampler.sampling.greedy else np.isfinite(found).all()):
                    raise RequestError(
                        f"the logits of slot 0 after token {len(seen)} are not finite; the weights or dtype overflow"
                    )
                token = int(found[0] if sampler.sampling.greedy else sampler(found, [seen])[0])
            if token in ends:
                return
            seen.append(token)
            yield token
            new = [token]

    def generate(
        self, prompt: str, max_new_tokens: int = 128, *, stop: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> str:  # fmt: skip
        """Text to follow `prompt`; see `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, stop=stop, **sampling))

    def stream(
        self, prompt: str, max_new_tokens: int = 128, *, stop: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> Iterator[str]:  # fmt: skip
        """Text to follow `prompt`, in pieces of whole characters, up to the first `stop` string.

        `sampling`: `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`. Raises `RequestError`.
        """
        self.check_task(classifies=False)
        ids = encode(self.tokenizer, prompt, self.artifact)
        assert self.tokenizer is not None  # or encode had raised
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        return until(pieces(self.tokenizer, self.stream_ids(ids, max_new_tokens, **sampling)), stops)

    def classify(self, inputs: str | Sequence[int] | Sequence[str | Sequence[int]]) -> np.ndarray:
        """Logits (B, labels), float32, of a text or of its ids, or of each of several, in an engine reset for them.

        Those of a text's last token that is no padding, as transformers' classifiers have it: ids that end in
        config.json's `pad_token_id` are read up to there. Raises `RequestError` before anything runs where an input
        does not fit.
        """
        self.check_task(classifies=True)
        single = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], Integral))
        rows: Any = [inputs] if single else inputs
        rows = [encode(self.tokenizer, row, self.artifact) if isinstance(row, str) else row for row in rows]
        if not rows:
            raise RequestError("there is nothing to classify; expected a text, ids, or several of them")
        found = dict(self.classify_each(rows))
        return np.stack([found[index] for index in range(len(rows))])

    def classify_each(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """The index and the logits (labels,) of each of several sequences of ids, as they come: the shortest first.

        As many at a time as there are slots. See `classify`.
        """
        self.check_task(classifies=True)
        texts = []
        for index, row in enumerate(rows):
            ids = np.asarray(row)
            try:
                if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
                    raise RequestError(f"ids are {ids.dtype} of shape {ids.shape}; expected integers (S,)")
                self.check_prompt(row)
            except RequestError as error:
                raise RequestError(f"input {index + 1}: {error}") from error
            real = np.flatnonzero(ids != self._padding)
            texts.append(ids[: real[-1] + 1 if real.size else 1])
        return self._classify_each(texts)

    def _classify_each(self, texts: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        order = sorted(range(len(texts)), key=lambda index: texts[index].size)  # rows of like lengths need less padding
        for start in range(0, len(order), self.graph.max_batch):
            chosen = order[start : start + self.graph.max_batch]
            lengths = np.array([texts[index].size for index in chosen])
            ids = np.zeros((len(chosen), lengths.max()), np.int64)
            for row, index in enumerate(chosen):
                ids[row, : lengths[row]] = texts[index]
            with self.in_use:
                self.reserve(*ids.shape)
                logits = self.prefill(ids, lengths).copy()
            for index, row in zip(chosen, logits, strict=True):
                if not np.isfinite(row).all():
                    raise RequestError(f"the logits of input {index + 1} are not finite; the weights or dtype overflow")
                yield index, row

    def _check(self, ids: np.ndarray, new: np.ndarray, fresh: bool = False) -> None:
        """Raise `RequestError` unless ids (B, S), of which new (B,) are real, may be appended."""
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

    def bucket(self, length: int) -> int:
        """The smallest capacity for slots of `length` tokens."""
        return next((size for size in self.graph.capacities if size >= length), self.graph.max_length)

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


def _end_ids(artifact: Artifact) -> frozenset[int]:
    """End-of-sequence ids, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        value = artifact.read_json(name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) for token in ids):
            raise ArtifactError(
                f"{artifact.path / name}: eos_token_id is {str(value)[:60]!r}; expected an integer or several"
            )
        return frozenset(ids)
    return frozenset()
