"""How well a model predicts texts, and how far its predictions are from another model's on the same texts.

n positions, S tokens of a window, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.backends.arrays import log_softmax
from runtime.bench import check_plot
from runtime.console import Progress
from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.evaluation.divergence import Divergence, Position
from runtime.evaluation.scorers import PIECE, EngineScorer, Scorer, check_alike
from runtime.evaluation.windows import Window, context_length, prefix_id, windows
from runtime.options import option
from runtime.text.tokenizer import decode, encode

CONTEXT = 16  # tokens before a position that are shown with it


@dataclass(frozen=True)
class PerplexityOptions:
    """The texts to predict, and how they are read. Raises `RequestError` for values that fit nothing."""

    text: list[Path] = option([], "A text file, UTF-8; may be repeated. Each is a document of its own.")
    length: int | None = option(None, "Tokens of context at most. Default: all that the model holds, less one.")
    stride: int | None = option(
        None, "Score this many tokens of a window, after as much context as --length leaves. Default: all of them."
    )
    worst: int = option(10, "Positions to show where the KL divergence is largest, when comparing.")
    plot: Path | None = option(None, "When comparing, draw a histogram of the KL divergence into this file.")
    as_json: bool = option(False, "Print JSON instead of tables.", flag="--json")

    def __post_init__(self) -> None:
        if not self.text:
            raise RequestError("expected --text FILE, once or more")
        for name, value, least in (
            ("--length", self.length, 1),
            ("--stride", self.stride, 1),
            ("--worst", self.worst, 0),
        ):
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}; expected {least} or more")

    def check(self, comparing: bool) -> None:
        """Raise `RequestError` where a picture is asked for and could not be drawn."""
        if self.plot is not None and not comparing:
            raise RequestError("--plot draws a comparison; expected --against too")
        if self.plot is not None:
            check_plot(self.plot)


class Document(NamedTuple):
    """A text with its ids (N,), int64."""

    path: Path
    size: int
    ids: np.ndarray


@dataclass
class Quality:
    """What was measured. `figures`: by name, as JSON has them. `divergences`: of each position, where compared."""

    figures: dict[str, Any]
    divergences: np.ndarray | None = None


@dataclass
class _Total:
    """The sum of a model's negative logprobs, nats, and the seconds that it took to compute logits."""

    nats: float = 0.0
    seconds: float = 0.0
    tokens: int = 0

    def figures(self, size: int) -> dict[str, float]:
        return {
            "bits_per_byte": self.nats / log(2) / size,
            "perplexity": float(np.exp(self.nats / self.tokens)),
            "tokens_per_second": self.tokens / self.seconds,
        }


def perplexity(engine: Engine, options: PerplexityOptions, against: Scorer | None = None) -> Quality:
    """Bits a byte, perplexity a token and tokens/s of the engine on the texts; with `against`, how far it is from that.

    The KL divergence is that of the engine's prediction from `against`'s, in nats. Tokens/s are those scored. Raises
    `RequestError`, and OSError for a file that is not to be read.
    """
    options.check(against is not None)
    prefix, scorer = prefix_id(engine), EngineScorer(engine)
    most = context_length(engine)
    if against is not None:
        check_alike(scorer, against)
        most = min(most, against.most)
    length = most if options.length is None else options.length
    stride = length if options.stride is None else options.stride
    for name, value, limit in (("--length", length, most), ("--stride", stride, length)):
        if value > limit:
            raise RequestError(f"{name} is {value}; expected 1 to {limit}")
    documents = [_read(engine, path) for path in options.text]
    work = [
        (number, window)
        for number, document in enumerate(documents)
        for window in windows(document.ids, prefix, length, stride)
    ]
    run = _Run(scorer, against, Divergence(options.worst))
    run.measure(work)
    size = sum(document.size for document in documents)
    figures: dict[str, Any] = {
        "artifact": scorer.name,
        "dtype": engine.graph.dtype,
        "quantization": engine.graph.quantization,
        "files": [str(path) for path in options.text],
        "bytes": size,
        "tokens": run.total.tokens,
        "length": length,
        "stride": stride,
        **run.total.figures(size),
    }
    if against is None:
        return Quality(figures)
    worst = [_described(engine, documents, position) for position in run.divergence.worst]
    compared = run.other_total.figures(size) | run.divergence.summary()
    return Quality(figures | {"against": {"name": against.name, **compared, "worst": worst}}, run.divergence.values)


@dataclass
class _Run:
    """One pass of a model, and of another beside it, over windows."""

    scorer: Scorer
    against: Scorer | None
    divergence: Divergence
    total: _Total = field(default_factory=_Total)
    other_total: _Total = field(default_factory=_Total)

    def measure(self, work: Sequence[tuple[int, Window]]) -> None:
        """Read each document's windows."""
        with Progress("perplexity") as progress:
            progress.expect(sum(-(-window.targets.size // PIECE) for _, window in work))
            for document, window in work:
                others = repeat(None)
                if self.against is not None:
                    others = _logprobs(self.against, window, self.other_total)
                start = window.start
                for logprobs, other in zip(_logprobs(self.scorer, window, self.total), others, strict=False):
                    if other is not None:
                        self.divergence.add(document, start, logprobs, other)
                    start += len(logprobs)
                    progress.advance()


def _logprobs(scorer: Scorer, window: Window, total: _Total) -> Iterator[np.ndarray]:
    """The logprobs (n, V), float64, of a window's scored positions, piece by piece; those of its targets are summed."""
    began, done = time.perf_counter(), 0
    for logits in scorer.rows(window.ids, window.first):
        total.seconds += time.perf_counter() - began
        if not np.isfinite(logits).all():
            raise RequestError(f"{scorer.name}: logits are not finite; the weights or dtype overflow")
        logprobs = log_softmax(logits)
        targets = window.targets[done : done + len(logprobs)]
        total.nats -= float(logprobs[np.arange(targets.size), targets].sum())
        total.tokens += targets.size
        done += targets.size
        yield logprobs
        began = time.perf_counter()


def _read(engine: Engine, path: Path) -> Document:
    """A text file's ids, as the artifact's tokenizer has them. Raises `RequestError` where there are none."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is no UTF-8; expected a text file") from None
    ids = np.array(encode(engine.tokenizer, text, engine.artifact, capacity=len(data)), np.int64)
    if not ids.size:
        raise RequestError(f"{path}: is empty; expected a text")
    if ids.max() >= engine.graph.vocabulary:
        raise RequestError(f"{path}: has token id {ids.max()}; expected 0 to {engine.graph.vocabulary - 1}")
    return Document(path, len(data), ids)


def _described(engine: Engine, documents: Sequence[Document], position: Position) -> dict[str, Any]:
    """A position as text: the token there, what comes before it, and what each model expects."""
    assert engine.tokenizer is not None
    tokenizer, ids = engine.tokenizer, documents[position.document].ids
    before = ids[max(0, position.place - CONTEXT) : position.place].tolist()

    def choice(token: int, probability: float) -> dict[str, Any]:
        return {"token": decode(tokenizer, [token]), "probability": probability}

    return {
        "file": str(documents[position.document].path),
        "position": position.place,
        "kl": position.kl,
        "context": decode(tokenizer, before) if before else "",
        "token": decode(tokenizer, [int(ids[position.place])]),
        "argmax": choice(*position.choice),
        "other_argmax": choice(*position.other_choice),
    }
