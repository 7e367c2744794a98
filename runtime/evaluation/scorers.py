"""What gives the logits after each token of a text: an engine here, and whatever else has a `Scorer`'s methods.

S tokens of a window, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.text.tokenizer import check_same_tokens

PIECE = 128  # rows of logits at a time, which bounds the memory that a large vocabulary takes


class Scorer(Protocol):
    """A language model that reads windows of a text. `name`: for people. `vocabulary`: V. `most`: S at most.

    `tokenizer`: where it has one.
    """

    name: str
    vocabulary: int
    most: int
    tokenizer: Tokenizer | None

    def rows(self, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """Logits (n, V), float32, after each of `ids` (S,) from position `first` on, `PIECE` rows at a time.

        The last piece may have fewer. A piece is valid until the next one.
        """
        ...


class EngineScorer:
    """An engine, which is reset for each window.

    A session that gives the logits of several tokens at once reads a piece of them at a time, another one token by
    token. Raises `RequestError` for a classifier.
    """

    def __init__(self, engine: Engine):
        engine.check_task(classifies=False)
        self.engine, self.name = engine, str(engine.artifact.path)
        self.vocabulary, self.most = engine.graph.vocabulary, engine.graph.max_length
        self.tokenizer = engine.tokenizer

    def rows(self, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """See `Scorer`. Raises `RequestError` where another call uses the engine meanwhile, or an id does not fit."""
        ids = self.engine.check_prompt(ids)
        self.engine.reserve(1, ids.size)
        held = self.engine.held
        lengths = np.zeros(1, np.int64)
        for start in range(0, first, PIECE):
            self._read(ids[start : min(start + PIECE, first)], lengths, 0)
        for start in range(first, ids.size, PIECE):
            self.engine.check_held(held)
            piece = ids[start : start + PIECE]
            yield self._read(piece, lengths, piece.size)

    def _read(self, ids: np.ndarray, lengths: np.ndarray, wanted: int) -> np.ndarray:
        """Append ids to the slot; the logits (wanted, V) of all of them, or of none."""
        engine, done, found = self.engine, 0, []
        most = min(engine.session.chunk, engine.session.most_rows) if wanted else engine.session.chunk
        with engine.in_use:
            while done < ids.size:
                piece = ids[done : done + most]
                if lengths[0] + piece.size > engine.session.capacity:
                    engine.session.grow(engine.bucket(int(lengths[0]) + piece.size))
                rows = engine.session.step_slot(0, piece, lengths, not wanted, piece.size if wanted else 1)
                lengths[0] += piece.size
                done += piece.size
                if wanted:
                    found.append(rows.copy())
        return np.concatenate(found) if found else np.zeros((0, self.vocabulary), np.float32)


def check_alike(scorer: Scorer, other: Scorer) -> None:
    """Raise `RequestError` where the two models do not have the same tokens: as many, with the same ids."""
    if scorer.vocabulary != other.vocabulary:
        raise RequestError(
            f"{other.name}: has {other.vocabulary} tokens, {scorer.name} has {scorer.vocabulary}; expected two models "
            "over one tokenizer"
        )
    check_same_tokens(scorer.tokenizer, other.tokenizer, other.name)
