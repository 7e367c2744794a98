"""The model that ships: small, and better at Python than gzip."""

import gzip
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from wm_models import DogeForCausalLM, shipped_checkpoint
from wm_models.training import Recipe
from wm_models.training.data import hold_out, read_documents
from wm_models.training.report import bits_per_byte
from wm_models.training.rows import pack


def test_it_is_small():
    files = [path for path in shipped_checkpoint().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert DogeForCausalLM.from_pretrained(shipped_checkpoint(), dtype="auto").dtype == torch.float16


@pytest.mark.slow
def test_held_out_bits_per_byte():
    """On a third of the held-out files, none of which it was trained on, by their names in its recipe."""
    recipe = Recipe.load("doge-3m", {})
    _, held_out = hold_out(read_documents(recipe.data, recipe.exclude), recipe.held_out)
    assert len(held_out) >= 0.9 * len(recipe.held_out)  # some distributions leave out idlelib
    held_out = held_out[::3]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    model = DogeForCausalLM.from_pretrained(shipped_checkpoint(), dtype=torch.float32).eval()
    rows = pack(held_out, tokenizer, recipe.sequence_length)
    total = 0.0
    for row in range(len(rows)):
        batch = {name: value[None] for name, value in rows[row].items()}
        with torch.no_grad():
            total += model(**batch, num_items_in_batch=torch.tensor(1), use_cache=False, skip_logits=True).loss.item()
    bits = bits_per_byte(total / rows.targets, rows.targets, held_out)
    texts = [document.text.encode() for document in held_out]
    packed = 8 * len(gzip.compress(b"".join(texts), 9)) / sum(map(len, texts))
    assert math.isfinite(bits)
    assert bits < 0.7 * packed
    assert bits == pytest.approx(1.09, abs=0.15)
