"""Packing: nothing lost, nothing predicted twice, nothing seen across a border."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wm_models import shipped_tokenizer
from wm_models.losses import IGNORED
from wm_models.training.data import Document
from wm_models.training.report import bits_per_byte
from wm_models.training.rows import ENCODED_AT_ONCE, pack

TOKENIZER = shipped_tokenizer()
BEGIN, END, PAD = 0, 1, 2


def documents(texts):
    return [Document(str(number), text) for number, text in enumerate(texts)]


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=8), st.integers(2, 20))
def test_every_token_is_predicted_once(texts, length):
    """What the rows predict, read in order, is every document's tokens and its end."""
    rows = pack(documents(texts), TOKENIZER, length)
    predicted = []
    for row in range(len(rows)):
        item = rows[row]
        assert item["input_ids"].shape == (length,)
        labels = item["labels"][1:]
        predicted += labels[labels != IGNORED].tolist()
        starts = item["input_ids"][item["position_ids"] == 0]
        assert all(token in (BEGIN, PAD) for token in starts[1:])
    expected = []
    for text in texts:
        expected += [*TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids, END]
    assert predicted == expected
    assert rows.targets == len(expected)


def test_positions_count_within_a_document_and_a_row():
    rows = pack(documents(["a b c d e f g", "h"]), TOKENIZER, 4)
    tokens = [len(TOKENIZER(text, add_special_tokens=False).input_ids) + 2 for text in ("a b c d e f g", "h")]
    assert tokens == [9, 3]
    assert rows.positions(slice(None)).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 0]]
    assert rows.lengths.tolist() == [4, 4, 4, 3]


def test_counts_divide():
    rows = pack(documents(["word " * 50]), TOKENIZER, 8)
    assert len(rows) == 8
    assert len(rows.divisible(3)) == 6
    repeated = rows.divisible(20)
    assert len(repeated) == 20
    assert np.array_equal(repeated.ids(slice(8, 16)), rows.ids(slice(None)))
    filled = rows.filled(5)
    assert len(filled) == 10
    assert filled.targets == rows.targets
    assert (filled[9]["labels"] == IGNORED).all()
    assert filled.digest() != rows.digest()


def test_special_tokens_in_a_text_are_text():
    rows = pack(documents(["<|pad|>"]), TOKENIZER, 16)
    assert rows.ids(0).tolist().count(PAD) == 16 - rows.lengths[0]


def test_bits_per_byte():
    """A model that gives every one of 256 bytes the same chance needs eight bits for each."""
    assert bits_per_byte(math.log(256), 6, len("éabcd".encode())) == pytest.approx(8)
    assert torch.is_tensor(pack(documents(["x"]), TOKENIZER, 4)[0]["labels"])


def test_texts_are_let_go_as_they_are_read(tmp_path):
    """A corpus may be larger than memory: few documents are alive at once. The files of tokens have no name."""
    alive = peak = 0

    class Text(str):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read():
        nonlocal alive, peak
        for number in range(40):
            alive += 1
            peak = max(peak, alive)
            yield Document(str(number), Text(f"text {number} " * (ENCODED_AT_ONCE // 60)))

    rows = pack(read(), TOKENIZER, 16, tmp_path)
    assert peak < 20
    assert not list(tmp_path.iterdir())
    whole = pack(list(read()), TOKENIZER, 16)
    assert rows.digest() == whole.digest()


def test_a_digest_is_that_of_all_rows_at_once():
    """Runs that were begun before tokens lay in files can be resumed."""
    rows = pack(documents(["word " * 50, "a b c"]), TOKENIZER, 8)
    everything = [part(slice(None)) for part in (rows.ids, rows.positions)]
    assert rows.digest() == hashlib.sha256(b"".join(part.tobytes() for part in everything)).hexdigest()
