"""A loaded artifact with its slots: prefill, decode, generate; or, of a classifier, classify.

B batch (slots), S new tokens, C cache capacity, V vocabulary.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifact.integrity import open_artifact
from runtime.artifact.manifest import Artifact
from runtime.backends.base import Options, Session
from runtime.backends.registry import AUTO, check_backend, choose_backend
from runtime.errors import ArtifactError, RequestError
from runtime.host.budget import Budget
from runtime.host.memory import returned_memory
from runtime.ids import as_integer, as_integers
from runtime.scheduler import Event, Request, Scheduler
from runtime.slots import Slots
from runtime.speculation.costs import measure
from runtime.speculation.options import GUESSES, METHODS, Speculation, check_draft, check_target
from runtime.text.chat import ChatTemplate, Message, encode_chat, load_chat_template
from runtime.text.constraint import Constraints, Grammar, json_schema
from runtime.text.labels import CONFIG, label_names
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import check_same_tokens, check_tokenizer, decode, encode, load_tokenizer

LOG = logging.getLogger(__name__)
GREEDY = Sampling()


def load(
    directory: str | PathLike[str],
    backend: str = AUTO,
    *,
    device: int | None = None,
    threads: int | None = None,
    allow_unverified: bool = False,
    public_key: str | PathLike[str] | bytes | None = None,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
) -> "Engine":
    """Load an artifact directory.

    `backend`: "cpu" (ONNX Runtime), "cuda" and "ort-tensorrt" (ONNX Runtime on a GPU), "tensorrt" (an engine in the
    artifact), or "auto": the first in `runtime.backends.registry.BACKENDS` for which nothing is missing. A backend
    asked for by name is used, or refused with what is missing. `device`: the index of the GPU, 0 for the first; refused
    with a backend that has none. `threads`: threads of the CPU (default: the physical cores). `public_key`: an Ed25519
    key's PEM file or its bytes; only what its holder signed is loaded. `max_bytes`: the most that the weights may have
    (default: the memory that is free). `max_seconds`: the longest that loading may take (default: no limit).

    Raises `ArtifactError` for a directory that is missing, damaged, not verified or not signed and for an engine that
    does not fit the GPU; `RequestError` for a backend that is unknown or cannot run here and for other wrong arguments.
    """
    check_backend(backend)
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; expected at least 1")
    if device is not None and device < 0:
        raise RequestError(f"device is {device}; expected 0 or more")
    budget, began = Budget(max_bytes, max_seconds), time.monotonic()
    try:
        with returned_memory():
            with open_artifact(Path(directory), allow_unverified, public_key, budget) as artifact:
                chosen = choose_backend(artifact, backend, device)
                session = chosen.open(artifact, Options(threads, device or 0, budget))
            engine = Engine(artifact, session)
    except (ArtifactError, RequestError) as error:
        LOG.warning("refused to load %s: %s", directory, error)
        raise
    LOG.info(
        "loaded %s: %s, %d parameters, %s, quantization %s, backend %s (%s was asked for) on %s, %s, %.2f s",
        directory, artifact.model_type, artifact.parameters, artifact.graph.dtype, artifact.graph.quantization,
        chosen.name, backend, session.device_name, "unsigned" if public_key is None else "signed",
        time.monotonic() - began,
    )  # fmt: skip
    return engine


class Engine(Slots):
    """A model that is ready to run, with a slot for each sequence of a batch: `Slots`, and text on top of them.

    A context manager: `with load(path) as engine` closes it at the end. `graph` says what the model allows. `end_ids`:
    the ids that end a sequence. `tokenizer`: None where the artifact has none. `labels`: a classifier's, by name; a
    language model has none. A stream whose slot was used by another call raises `RequestError`.
    """

    def __init__(self, artifact: Artifact, session: Session):
        super().__init__(session)
        self.artifact = artifact
        self.tokenizer = load_tokenizer(artifact)
        self.end_ids = _end_ids(artifact)
        self.labels = label_names(artifact)
        padding = artifact.read_json(CONFIG).get("pad_token_id")
        self._padding = padding if isinstance(padding, int) else -1  # which is no id
        self.speculation: Speculation | None = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """The text's ids, special tokens of the tokenizer included. Raises `RequestError` without a tokenizer."""
        return encode(self.tokenizer, text, self.artifact)

    def decode_ids(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens. Raises `RequestError` without a tokenizer."""
        tokenizer = check_tokenizer(self.tokenizer, self.artifact)
        return decode(tokenizer, as_integers(ids, "ids", 1).tolist()) if len(ids) else ""

    def speculate(self, by: "str | Engine | None" = "ngram", guesses: int = GUESSES) -> None:
        """Guess tokens ahead in every later generation, and check several in one step; answers stay as they are.

        `by`: "ngram", what followed the last tokens when they occurred before; the engine of a smaller model over the
        same tokenizer, which nothing else uses meanwhile and the caller closes; or None for no guesses. `guesses`: the
        most of a sequence in one step; fewer are made where they are often wrong. Times some steps, and empties the
        slots. See `runtime.speculation`.

        Raises `RequestError` where the artifact or the draft does not allow it.
        """
        if by is None:
            self.speculation = None
            return
        self.check_task(classifies=False)
        check_target(self.artifact, self.session)
        guesses = as_integer(guesses, "guesses", 1, min(self.session.most_rows, self.session.chunk) - 1)
        if isinstance(by, Engine):
            check_draft(self.artifact, by.artifact)
            check_same_tokens(self.tokenizer, by.tokenizer, str(by.artifact.path))
            self.speculation = Speculation(measure(self, by), by, guesses)
        elif by in METHODS:
            self.speculation = Speculation(measure(self), None, guesses)
        else:
            raise RequestError(f"speculation is by {by!r}; expected {', '.join(METHODS)} or an engine")

    def check_task(self, classifies: bool) -> None:
        """Raise `RequestError` where this is a language model and a classifier is asked for, or the reverse."""
        if classifies and not self.labels:
            raise RequestError(f"{self.artifact.path}: is a language model, which has no labels; use generate")
        if not classifies and self.labels:
            raise RequestError(f"{self.artifact.path}: is a classifier, which writes no text; use classify")

    def events(self, request: Request) -> Iterator[Event]:
        """What a request brings, token by token, alone in an engine that is reset for it. Raises `RequestError`.

        A `runtime.scheduler.Scheduler` serves several at once.
        """
        scheduler = Scheduler(self, 1, self.session.chunk, prefix_memory=0)
        scheduler.begin(request)
        return _without_errors(scheduler.run())

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The artifact's chat template, or None. Raises `ArtifactError` for one of another form."""
        return load_chat_template(self.artifact)

    @cached_property
    def constraints(self) -> Constraints:
        """What makes constraints of grammars for this model's tokenizer."""
        return Constraints(self.tokenizer, self.graph.vocabulary, self.end_ids)

    def close(self) -> None:
        """Give all memory back. A second call does nothing; any other call raises `RequestError`."""
        super().close()
        made = vars(self)
        if made.get("chat_template") is not None:
            self.chat_template.sandbox.close()  # type: ignore[union-attr]
        if "constraints" in made:
            self.constraints.close()

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """The ids of a prompt for the assistant's next message; see `ChatTemplate.render`. Raises `RequestError`."""
        return encode_chat(self.chat_template, self.tokenizer, self.artifact, messages, variables)

    def chat(
        self, messages: Sequence[Message], max_new_tokens: int = 128, *, stop: str | Sequence[str] | None = None,
        sampling: Sampling = GREEDY, grammar: Grammar | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The assistant's next message in pieces of whole characters, by the checkpoint's own chat template.

        `messages`: objects with `role` and `content`. `grammar`: what the answer must be, see
        `runtime.text.constraint`. `variables`: further names for the template. Raises `RequestError`.
        """
        self.check_task(classifies=False)
        ids = self.encode_chat(messages, variables)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        constraint = None if grammar is None else self.constraints.start(grammar)
        events = self.events(Request(ids, max_new_tokens, sampling, stops, constraint=constraint))
        return (event.text for event in events if event.text)

    def generate_json(
        self, prompt: str, schema: Mapping[str, Any] | str, max_new_tokens: int = 128, *,
        sampling: Sampling = GREEDY,
    ) -> str:  # fmt: skip
        """JSON to follow `prompt` that the schema, or its text, allows, at every temperature.

        Raises `RequestError` where it is not finished after `max_new_tokens`. For other grammars, and for the tokens as
        they come: `events` with a request whose constraint is `constraints.start(grammar)`.
        """
        self.check_task(classifies=False)
        constraint = self.constraints.start(json_schema(schema))
        text = ""
        for event in self.events(Request(self.encode(prompt), max_new_tokens, sampling, constraint=constraint)):
            text += event.text
            if event.finish_reason == "length":
                raise RequestError(f"the JSON is not finished after {max_new_tokens} tokens; ask for more of them")
        return text

    def generate_ids(
        self, ids: Sequence[int], max_new_tokens: int = 128, *, stop_ids: Sequence[int] = (), temperature: float = 0.0,
        top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, seed: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids to follow `ids`; see `stream_ids`."""
        return list(
            self.stream_ids(
                ids, max_new_tokens, stop_ids=stop_ids, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, seed=seed,
            )
        )  # fmt: skip

    def stream_ids(
        self, ids: Sequence[int], max_new_tokens: int = 128, *, stop_ids: Sequence[int] = (), temperature: float = 0.0,
        top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, seed: int | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Ids to follow `ids`, one by one, in an engine that is reset for them.

        It ends after `max_new_tokens`, before an end-of-sequence id or one of `stop_ids`, or when the slot is full.
        How an id is chosen: see `runtime.text.sampling.Sampling`. Raises `RequestError`.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        events = self.events(Request(ids, max_new_tokens, sampling, stop_ids=tuple(stop_ids), text=False))
        return (event.token for event in events if event.token is not None)

    def generate(
        self, prompt: str, max_new_tokens: int = 128, *, stop: str | Sequence[str] | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> str:  # fmt: skip
        """Text to follow `prompt`; see `stream`."""
        return "".join(
            self.stream(
                prompt, max_new_tokens, stop=stop, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, seed=seed,
            )
        )  # fmt: skip

    def stream(
        self, prompt: str, max_new_tokens: int = 128, *, stop: str | Sequence[str] | None = None,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """Text to follow `prompt`, in pieces of whole characters, up to the first `stop` string.

        How a token is chosen: see `runtime.text.sampling.Sampling`. Raises `RequestError`.
        """
        self.check_task(classifies=False)
        ids = self.encode(prompt)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        events = self.events(Request(ids, max_new_tokens, sampling, stops))
        return (event.text for event in events if event.text)

    def score(self, ids: Sequence[int]) -> np.ndarray:
        """The logprob of each of `ids` after those before it, without the first: (S - 1,), float64.

        An artifact that gives the logits of one token a step is read token by token. Raises `RequestError`.
        """
        (event,) = self.events(Request(ids, 0, prompt_logprobs=1, text=False))
        return np.array([each.logprob for each in event.prompt_logprobs or () if each is not None])

    def classify(self, inputs: str | Sequence[int] | Sequence[str | Sequence[int]]) -> np.ndarray:
        """Logits (B, labels), float32, of a text or of its ids, or of each of several, in an engine reset for them.

        Those of a text's last token that is no padding, as transformers' classifiers have it: ids that end in
        config.json's `pad_token_id` are read up to there. Raises `RequestError` before anything runs where an input
        does not fit.
        """
        self.check_task(classifies=True)
        if not isinstance(inputs, str | list | tuple | range | np.ndarray):
            raise RequestError(f"inputs are {type(inputs).__name__}; expected a text, ids, or several of them")
        single = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], Integral))
        rows: Any = [inputs] if single else inputs
        rows = [self.encode(row) if isinstance(row, str) else row for row in rows]
        if not len(rows):
            raise RequestError("there is nothing to classify; expected a text, ids, or several of them")
        found = dict(self.classify_each(rows))
        return np.stack([found[index] for index in range(len(rows))])

    def classify_each(self, rows: Sequence[Sequence[int]], *, strict: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """The index and the logits (labels,) of each of several sequences of ids, as they come: the shortest first.

        As many at a time as there are slots. See `classify`. Raises `RequestError` for logits that are not finite,
        unless `strict` is False.
        """
        self.check_task(classifies=True)
        texts = []
        for index, row in enumerate(rows):
            try:
                ids = self.check_prompt(row)
            except RequestError as error:
                raise RequestError(f"input {index + 1}: {error}") from error
            real = np.flatnonzero(ids != self._padding)
            texts.append(ids[: real[-1] + 1 if real.size else 1])
        return self._classify_each(texts, strict)

    def _classify_each(self, texts: list[np.ndarray], strict: bool) -> Iterator[tuple[int, np.ndarray]]:
        order = sorted(range(len(texts)), key=lambda index: texts[index].size)  # rows of like lengths need less padding
        for start in range(0, len(order), self.graph.max_batch):
            chosen = order[start : start + self.graph.max_batch]
            lengths = np.array([texts[index].size for index in chosen])
            ids = np.zeros((len(chosen), lengths.max()), np.int64)
            for row, index in enumerate(chosen):
                ids[row, : lengths[row]] = texts[index]
            with self.in_use:
                self.reserve(*ids.shape)
                logits = self.prefill(ids, lengths)
            for index, row in zip(chosen, logits, strict=True):
                if strict and not np.isfinite(row).all():
                    raise RequestError(f"the logits of input {index + 1} are not finite; the weights or dtype overflow")
                yield index, row


def _without_errors(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        if event.error is not None:
            raise RequestError(event.error)
        yield event


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
