"""The models that ship: small; one better at Python than gzip, one tuned to answer."""

import gzip
import json
import math

import jsonschema
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from export import OnnxOptions, export_onnx
from runtime import load
from runtime.text.chat import encode_chat, load_chat_template
from wm_models import DogeForCausalLM, shipped_checkpoint
from wm_models.losses import IGNORED
from wm_models.shipped import SHIPPED_CHECKPOINTS, TUNED
from wm_models.training import Recipe
from wm_models.training.data import Corpus, read_documents
from wm_models.training.report import bits_per_byte
from wm_models.training.rows import pack
from wm_models.training.tuning import load_base, prepare_chats


@pytest.mark.parametrize("name", SHIPPED_CHECKPOINTS)
def test_it_is_small(name):
    files = [path for path in shipped_checkpoint(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert DogeForCausalLM.from_pretrained(shipped_checkpoint(name), dtype="auto").dtype == torch.float16


def test_another_name_does_not_ship():
    with pytest.raises(ValueError, match="'doge-4m' does not ship; expected one of doge-3m, doge-3m-instruct"):
        shipped_checkpoint("doge-4m")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["push", "pop"]}, "arguments": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


def test_the_tuned_one_takes_chats_and_schemas(tmp_path):
    """Exported: its template renders as transformers renders it, an answer ends, and JSON meets a schema."""
    export_onnx(TUNED, tmp_path / "artifact", OnnxOptions(max_length=256, max_batch=1))
    engine = load(tmp_path / "artifact")
    messages = [{"role": "user", "content": "Write a function that returns the sum of two numbers."}]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint(TUNED))
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    template = load_chat_template(engine.artifact)
    assert encode_chat(template, engine.tokenizer, engine.artifact, messages) == expected
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in engine.end_ids
    prompt = template.render(messages)
    found = json.loads(engine.generate_json(prompt, SCHEMA, max_new_tokens=64))
    jsonschema.validate(found, SCHEMA)


@pytest.mark.slow
def test_the_tuned_one_s_held_out_loss():
    """On a third of the instructions that are held out: what its training.json says, and below that of its base."""
    recipe = Recipe.load(TUNED, {})
    torch.manual_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    rows = prepare_chats(recipe, tokenizer).held_out_rows
    tuned = DogeForCausalLM.from_pretrained(shipped_checkpoint(TUNED), dtype=torch.float32)
    losses = []
    for model in (base.eval(), tuned.eval()):
        total, count = 0.0, 0
        for row in range(0, len(rows), 3):
            batch = {name: value[None] for name, value in rows[row].items()}
            targets = int((batch["labels"] != IGNORED).sum())
            with torch.no_grad():
                total += model(**batch, use_cache=False, skip_logits=True).loss.item() * targets
            count += targets
        losses.append(total / count)
    report = json.loads((shipped_checkpoint(TUNED) / "training.json").read_text())
    assert losses[1] < losses[0] - 0.2
    assert losses[1] == pytest.approx(report["held_out_loss"], abs=0.15)
    assert losses[0] == pytest.approx(report["held_out_loss_before"], abs=0.15)


@pytest.mark.slow
def test_held_out_bits_per_byte():
    """On a third of the held-out files, none of which it was trained on, by their names in its recipe."""
    recipe = Recipe.load("doge-3m", {})
    corpus = Corpus(lambda: read_documents(recipe.data, recipe.exclude), recipe.held_out)
    held_out = list(corpus.held_out_documents())
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
    texts = [document.text.encode() for document in held_out]
    bits = bits_per_byte(total / rows.targets, rows.targets, sum(map(len, texts)))
    packed = 8 * len(gzip.compress(b"".join(texts), 9)) / sum(map(len, texts))
    assert math.isfinite(bits)
    assert bits < 0.7 * packed
    assert bits == pytest.approx(1.09, abs=0.15)
