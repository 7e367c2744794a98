"""Tokenizers that would end the process or take its memory: refused when they are loaded, or when they read."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runtime import ArtifactError, RequestError, load
from runtime.text.limits import TOKEN_BYTES, check_growth, check_length, guarded
from runtime.text.tokenizer import encode
from test_trust.samples import rewrite


def tokenizer(**parts):
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def doubled(steps):
    return normalizers.Sequence([normalizers.Replace("a", "aa")] * steps)


def template(pieces):
    return processors.TemplateProcessing(single=pieces, special_tokens=[])


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", doubled(100)),
        ("normalizer", normalizers.Sequence([normalizers.Sequence([doubled(5)] * 2), doubled(5)])),
        ("normalizer", normalizers.Replace("a", "b" * 10_000)),
        ("normalizer", normalizers.Prepend("b" * 10_000)),
        ("normalizer", normalizers.Sequence([normalizers.ByteLevel()] * 40)),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)),
        ("post_processor", template("$A $A $A")),
        ("post_processor", processors.Sequence([template("$A $A")] * 40)),
        ("decoder", decoders.Sequence([decoders.Replace("a", "aa")] * 40)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_growth_is_refused(part, value):
    with pytest.raises(ValueError, match=f"its {part} can make more than"):
        check_growth(tokenizer(**{part: value}))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        ("normalizer", normalizers.BertNormalizer()),
        (
            "normalizer",
            normalizers.Sequence(
                [
                    normalizers.Replace("``", '"'),
                    normalizers.NFKD(),
                    normalizers.StripAccents(),
                    normalizers.Lowercase(),
                ]
                + [normalizers.NFKD()] * 20
            ),
        ),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
        ("post_processor", processors.TemplateProcessing(single="[B] $A [E]", special_tokens=[("[B]", 0), ("[E]", 1)])),
        ("post_processor", processors.ByteLevel()),
        (
            "decoder",
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip()]),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_models_have_is_not(part, value):
    check_growth(tokenizer(**{part: value}))


def test_a_table_of_replacements_counts_by_its_longest():
    """A sentencepiece table: the size of a trie, the trie, and texts that end in 0."""
    import base64
    import struct

    for longest, refused in ((30, False), (5000, True)):
        table = struct.pack("<I", 1024) + bytes(1024) + b"x\0" + b"y" * longest + b"\0"
        state = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
        whole = json.loads(tokenizer().to_str())
        made = Tokenizer.from_str(json.dumps({**whole, "normalizer": state}))
        if refused:
            with pytest.raises(ValueError, match="normalizer"):
                check_growth(made)
        else:
            check_growth(made)


def test_a_panic_is_an_error():
    """A pattern whose search gives up ends in a panic, which is no `Exception`."""
    made = tokenizer(normalizer=normalizers.Replace(Regex("(a+)+$"), "b"))
    with pytest.raises(RequestError, match="retry-limit"):
        guarded(lambda: made.encode("a" * 40 + "!"), RequestError)


def test_what_is_no_panic_passes():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(interrupted, RequestError)


def test_a_text_is_measured_before_it_is_read():
    plain = tokenizer()
    check_length(plain, "a" * 10 * TOKEN_BYTES, 10)
    check_length(plain, "\ud800", 10)
    for text in ("a" * (10 * TOKEN_BYTES + 1), "é" * (5 * TOKEN_BYTES + 1)):
        with pytest.raises(RequestError, match=r"bytes; this artifact's capacity is 10 tokens"):
            check_length(plain, text, 10)


def test_memory_counts_what_a_tokenizer_makes_of_a_text(monkeypatch):
    monkeypatch.setattr("runtime.text.limits.available_memory", lambda: 100_000)
    check_length(tokenizer(), "a" * 400, 10)
    for made in (tokenizer(normalizer=doubled(3)), tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel())):
        with pytest.raises(RequestError, match="memory are available"):
            check_length(made, "a" * 400, 10)


@pytest.fixture
def change_tokenizer(copy):
    def change(**fields):
        text = json.loads(tokenizer().to_str()) | fields
        (copy / "tokenizer.json").write_text(json.dumps(text))
        rewrite(copy, lambda manifest: manifest["files"].update({"tokenizer.json": {}}))
        rewrite(copy)
        return copy

    return change


def test_saved_truncation_and_padding_change_no_prompt(change_tokenizer):
    """A tokenizer.json keeps them from its training; transformers' fast tokenizers do not apply them either."""
    padding = {
        "strategy": {"Fixed": 2_000_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a",
    }  # fmt: skip
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    directory = change_tokenizer(padding=padding, truncation=truncation, pre_tokenizer={"type": "Whitespace"})
    engine = load(directory)
    text = "a b a b a"
    ids = encode(engine.tokenizer, text, engine.artifact)
    assert ids == [0, 1, 0, 1, 0]
    assert ids == PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))(text).input_ids


def test_an_engine_refuses_what_its_tokenizer_would_do(change_tokenizer):
    directory = change_tokenizer(normalizer=json.loads(doubled(100).__getstate__()))
    with pytest.raises(ArtifactError, match=r"tokenizer.json: is no tokenizer: its normalizer can make"):
        load(directory)
    pattern = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    engine = load(change_tokenizer(normalizer=pattern, decoder=pattern))
    with pytest.raises(RequestError, match=r"cannot read the prompt: .*retry-limit"):
        engine.generate("a" * 40 + "!")
    with pytest.raises(RequestError, match=r"the prompt has 10,000,000 bytes; this artifact's capacity is 300 tokens"):
        engine.generate("a" * 10_000_000)
