"""Training a byte-level BPE."""

import pytest

from wm_models.training import TrainingError
from wm_models.training.tokenizer import train_tokenizer

TEXT = "def first(value): return value\n" * 50


def test_size_round_trip_and_special_ids(tmp_path):
    tokenizer = train_tokenizer([TEXT], 270)
    assert len(tokenizer) == 270
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    strange = "déf ∀ \x00\t"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_sizes_that_cannot_be():
    with pytest.raises(TrainingError, match="train on more"):
        train_tokenizer([TEXT], 5000)
    with pytest.raises(TrainingError, match="at least 259"):
        train_tokenizer([TEXT], 100)
