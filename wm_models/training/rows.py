"""Documents packed into rows of one length, so that no shape ever changes.

R rows, S tokens of a row.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from wm_models.losses import IGNORED
from wm_models.training.data import Document
from wm_models.training.errors import TrainingError

ENCODED_AT_ONCE = 1000  # documents


class Rows(Dataset[dict[str, torch.Tensor]]):
    """What the model takes, row by row: input_ids, position_ids and labels, (S) int64 each.

    ids and positions (R, S) int32; lengths (R), the tokens of a row that are no padding. Positions start again at a
    document's border and at a row's, which keeps documents apart in the model. A label is the token itself, except
    that nothing predicts a document's first token, or padding. `answers` (R, S) bool leaves labels to these tokens
    alone.
    """

    def __init__(self, ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray, answers: np.ndarray | None = None):
        self.ids, self.positions, self.lengths, self.answers = ids, positions, lengths, answers

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids, positions = (torch.from_numpy(part[row].astype(np.int64)) for part in (self.ids, self.positions))
        predicted = torch.from_numpy(self.predicted(row))
        return {"input_ids": ids, "position_ids": positions, "labels": torch.where(predicted, ids, IGNORED)}

    def predicted(self, row: int) -> np.ndarray:
        """Which tokens of a row have a label: (S) bool."""
        found = (self.positions[row] > 0) & (np.arange(self.ids.shape[1]) < self.lengths[row])
        return found if self.answers is None else found & self.answers[row]

    @property
    def targets(self) -> int:
        """How many tokens are predicted in all rows."""
        return sum(int(self.predicted(row).sum()) for row in range(len(self)))

    def digest(self) -> str:
        """A hash of every token, and of which have labels: the same exactly when the data are."""
        parts = [part for part in (self.ids, self.positions, self.answers) if part is not None]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

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
        answers = None if self.answers is None else self.answers[rows]
        return Rows(self.ids[rows], self.positions[rows], self.lengths[rows], answers)


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


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int) -> Rows:
    """Every document's tokens, with the ids that begin and end it, cut into rows of `length` tokens.

    The last token of a row is the first of the next one, so each token of a document is predicted once.
    """
    special = special_ids(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # in a text they are text
    streams, positions = [], []
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        texts = [document.text for document in documents[start : start + ENCODED_AT_ONCE]]
        for encoding in backend.encode_batch(texts, add_special_tokens=False):
            streams.append(np.array([special.begin, *encoding.ids, special.end], dtype=np.int32))
            positions.append(np.arange(len(streams[-1]), dtype=np.int32))
    stream, position = np.concatenate(streams), np.concatenate(positions)

    stride = length - 1
    count = max(-(-(len(stream) - 1) // stride), 1)
    missing = count * stride + 1 - len(stream)
    stream = np.concatenate([stream, np.full(missing, special.pad, dtype=np.int32)])
    position = np.concatenate([position, np.arange(missing, dtype=np.int32)])
    offsets = np.arange(length, dtype=np.int32)
    at = np.arange(count)[:, None] * stride + offsets
    lengths = np.full(count, length)
    lengths[-1] -= missing
    return Rows(stream[at], np.minimum(position[at], offsets), lengths)
