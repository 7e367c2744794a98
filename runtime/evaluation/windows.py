"""How a text longer than the context is cut into windows, and which of their tokens are scored: each token once.

The windows are those of lm-evaluation-harness, so that its tasks and `wm-run perplexity` measure the same.

S tokens of a window, N tokens of a text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from runtime.engine import Engine
from runtime.errors import RequestError


class Window(NamedTuple):
    """`ids` (S,), int64, are read, and the logits from position `first` on predict `targets` (S - first,), int64.

    `start`: the place of the first target in the text.
    """

    ids: np.ndarray
    first: int
    targets: np.ndarray
    start: int


def windows(ids: np.ndarray, prefix: int, length: int, stride: int) -> Iterator[Window]:
    """The windows of a text's `ids` (N,): at most `length` tokens are read, and each window scores `stride` new ones.

    The first window scores all that it reads. `prefix` is the token before the text. With `stride` equal to `length`
    nothing is read twice, but for the last window, which is as long as the others. `stride` is 1 to `length`.
    """
    read = np.concatenate([[prefix], ids]).astype(np.int64)
    start, end = 0, min(length, ids.size)
    while start < ids.size:
        begin = max(0, end - length)
        yield Window(read[begin:end], start - begin, read[start + 1 : end + 1], start)
        start, end = end, min(end + stride, ids.size)


def context_length(engine: Engine) -> int:
    """Tokens that a window reads at most: the last one that is scored takes a place in the slot too."""
    return engine.graph.max_length - 1


def prefix_id(engine: Engine) -> int:
    """The token that comes before a text: config.json's `bos_token_id`, or else the end-of-sequence id.

    Raises `RequestError` for a classifier, an artifact without a tokenizer, and one without an end-of-sequence id.
    """
    engine.check_task(classifies=False)
    if engine.tokenizer is None:
        raise RequestError(f"{engine.artifact.path}: has no tokenizer, which measuring needs; export one with it")
    if not engine.end_ids:
        raise RequestError(f"{engine.artifact.path}: names no eos_token_id in config.json, which measuring needs")
    first = engine.artifact.read_json("config.json").get("bos_token_id")
    return first if isinstance(first, int) else min(engine.end_ids)
