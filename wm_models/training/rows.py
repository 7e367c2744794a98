"""Documents packed into rows of one length, so that no shape ever changes. Their tokens lie in files, not in memory.

R rows, S tokens of a row.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from wm_models.losses import IGNORED
from wm_models.training.data import Document
from wm_models.training.errors import TrainingError

ENCODED_AT_ONCE = 1 << 20  # characters, or one document that has more
READ_AT_ONCE = 1024  # rows, where all of them are gone through


class Rows(Dataset[dict[str, torch.Tensor]]):
    """What the model takes, row by row: input_ids, position_ids and labels, (S) int64 each.

    ids and positions (…, S) int32, which may lie in files; lengths (R), the tokens of a row that are no padding.
    Positions start again at a document's border and at a row's, which keeps documents apart in the model. A label is
    the token itself, except that nothing predicts a document's first token, or padding. `answers` (…, S) bool leaves
    labels to these tokens alone. `order` (R) says which row of the arrays each row is; by default they are in order.
    """

    def __init__(
        self, ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray,
        answers: np.ndarray | None = None, order: np.ndarray | None = None,
    ):  # fmt: skip
        self.lengths = lengths
        self._ids, self._positions, self._answers = ids, positions, answers
        self._order = np.arange(len(ids)) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids, positions = (torch.from_numpy(part.astype(np.int64)) for part in (self.ids(row), self.positions(row)))
        predicted = torch.from_numpy(self.predicted(row))
        return {"input_ids": ids, "position_ids": positions, "labels": torch.where(predicted, ids, IGNORED)}

    def ids(self, rows: int | slice) -> np.ndarray:
        """Tokens of a row, (S) int32, or of some rows."""
        return self._ids[self._order[rows]]

    def positions(self, rows: int | slice) -> np.ndarray:
        """Positions of a row, (S) int32, or of some rows."""
        return np.minimum(self._positions[self._order[rows]], np.arange(self._ids.shape[1], dtype=np.int32))

    def predicted(self, rows: int | slice) -> np.ndarray:
        """Which tokens of a row have a label: (S) bool; or of some rows."""
        found = (self.positions(rows) > 0) & (np.arange(self._ids.shape[1]) < self.lengths[rows, None])
        return found if self._answers is None else found & self._answers[self._order[rows]]

    @property
    def targets(self) -> int:
        """How many tokens are predicted in all rows."""
        return sum(int(self.predicted(some).sum()) for some in self._pieces())

    def digest(self) -> str:
        """A hash of every token, and of which have labels: the same exactly when the data are."""
        found = hashlib.sha256()
        for part in (self.ids, self.positions):
            for some in self._pieces():
                found.update(part(some).tobytes())
        if self._answers is not None:
            for some in self._pieces():
                found.update(self._answers[self._order[some]].tobytes())
        return found.hexdigest()

    def divisible(self, by: int) -> "Rows":
        """Rows in a number divisible by `by`: the last few are left out or, where all are fewer, repeated."""
        count = len(self) // by * by or by
        return self._take(np.arange(count) % len(self))

    def filled(self, by: int) -> "Rows":
        """Rows in a number divisible by `by`, filled with rows that predict nothing."""
        extra = -len(self) % by
        whole = self._take(np.concatenate([np.arange(len(self)), np.zeros(extra, dtype=np.int64)]))
        whole.lengths[len(self) :] = 0
        return whole

    def _take(self, rows: np.ndarray) -> "Rows":
        return Rows(self._ids, self._positions, self.lengths[rows], self._answers, self._order[rows])

    def _pieces(self) -> Iterator[slice]:
        return (slice(start, start + READ_AT_ONCE) for start in range(0, len(self), READ_AT_ONCE))


class Special(NamedTuple):
    """The ids around a document, and of padding."""

    begin: int
    end: int
    pad: int


def special_ids(tokenizer: PreTrainedTokenizerFast) -> Special:
    """A tokenizer's special ids; the end stands in where it has no beginning or no padding."""
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise TrainingError(f"{tokenizer.name_or_path}: the tokenizer has no token that ends a text (eos_token)")
    begin, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    return Special(end if begin is None else begin, end, end if pad is None else pad)  # type: ignore[arg-type]


def _pieces_of_text(documents: Iterable[Document]) -> Iterator[list[str]]:
    """The texts of documents, as many at a time as have `ENCODED_AT_ONCE` characters."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= ENCODED_AT_ONCE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, length: int, folder: Path | None = None
) -> Rows:
    """Every document's tokens, with the ids that begin and end it, cut into rows of `length` tokens.

    The last token of a row is the first of the next one, so each token of a document is predicted once. Tokens are
    written to files without a name in `folder`, by default the system's for temporary files, 8 bytes each; they are
    gone with the rows.
    """
    special = special_ids(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # in a text they are text
    stride = length - 1
    with tempfile.TemporaryFile(dir=folder) as ids, tempfile.TemporaryFile(dir=folder) as positions:

        def write(tokens: np.ndarray) -> int:
            ids.write(tokens.data)
            positions.write(np.arange(len(tokens), dtype=np.int32).data)
            return len(tokens)

        total = 0
        for texts in _pieces_of_text(documents):
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
                total += write(np.array([special.begin, *encoding.ids, special.end], dtype=np.int32))
        count = max(-(-(total - 1) // stride), 1)
        missing = count * stride + 1 - total
        write(np.full(missing, special.pad, dtype=np.int32))
        parts = []
        for file in (ids, positions):
            file.flush()
            tokens = np.memmap(file, dtype=np.int32, mode="r")
            parts.append(np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride])
    lengths = np.full(count, length)
    lengths[-1] -= missing
    return Rows(parts[0], parts[1], lengths)
