"""The runtime's tokenizer against transformers' fast tokenizer, for every kind of tokenizer.json."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from runtime.artifact.manifest import TOKENIZER
from runtime.text.tokenizer import decode, encode, load_tokenizer
from wm_models.shipped import ASSETS, TRAINED

CORPUS = [
    Path(__file__).read_text(),
    "naïve café, Ångström und Straße; 数据 и слова. The lazy dog's 1234 tails — ½ ﬁn!\n",
] * 3
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
TEXTS = [
    "def main(argument):\n    return argument + 1\n",
    "The lazy dog's tails, 1234 of them.",
    " leading, trailing and  double  spaces ",
    "naïve café; Ångström; Straße; STRASSE; ﬁn ½",
    "数据 и слова, unseen: ☃ 🙂 \u0301\u200d",
    "[CLS] [MASK]text[SEP] in the text, <extra> new_word new_words <extra",
    "\ttabs\r\nand\u2028other\u0085ends\n\n",
    "a",
    "",
    "x" * 300,
]


def byte_level_bpe():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    return made, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def bpe():
    """With a mark at words' ends, as GPT-1 has it."""
    made = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    return made, trainers.BpeTrainer(end_of_word_suffix="</w>")


def bpe_with_bytes():
    """As sentencepiece's BPE is converted: spaces become ▁, and what is unknown its bytes."""
    made = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made, trainers.BpeTrainer(special_tokens=[f"<0x{byte:02X}>" for byte in range(256)])


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made, trainers.UnigramTrainer(unk_token="[UNK]")


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer()


def word_level():
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return made, trainers.WordLevelTrainer()


def trained(build):
    made, trainer = build()
    trainer.vocab_size = 600
    trainer.special_tokens = [*SPECIAL, *(token.content for token in trainer.special_tokens)]
    trainer.show_progress = False
    made.train_from_iterator(CORPUS, trainer)
    return made


def padded_and_truncated(made):
    made.enable_truncation(5, stride=1)
    made.enable_padding(pad_id=3, pad_token="[PAD]", length=64)


def with_added_tokens(made):
    made.add_tokens(
        [
            AddedToken("<extra>", lstrip=True, rstrip=True),
            AddedToken("new_word", single_word=True),
            AddedToken("CAFÉ", normalized=True),
        ]
    )
    made.add_special_tokens([AddedToken("<|end|>"), AddedToken("[MASK]", lstrip=True, special=True)])


def with_template(made):
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )


KINDS = {"byte-level BPE": byte_level_bpe, "BPE": bpe, "BPE with bytes": bpe_with_bytes, "Unigram": unigram,
         "WordPiece": word_piece, "WordLevel": word_level}  # fmt: skip
CHANGES = {"plain": None, "saved padding and truncation": padded_and_truncated, "added tokens": with_added_tokens,
           "special tokens around": with_template}  # fmt: skip


def assert_same(path):
    """Ids of every text, and the texts of the ids with special tokens and without."""
    described: object = SimpleNamespace(
        path=path.parent, texts={TOKENIZER: path.read_bytes()}, graph=SimpleNamespace(max_length=1024)
    )
    ours, theirs = load_tokenizer(described), PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in TEXTS:
        ids = encode(ours, text, described)
        assert ids == theirs(text).input_ids, text
        for special in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            assert decode(ours, ids, special=special) == expected, text


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_transformers(kind, change, tmp_path):
    made = trained(KINDS[kind])
    if CHANGES[change] is not None:
        CHANGES[change](made)
    made.save(str(tmp_path / TOKENIZER))
    assert_same(tmp_path / TOKENIZER)


@pytest.mark.parametrize("directory", [ASSETS, ASSETS / TRAINED], ids=["presets", TRAINED])
def test_the_shipped_ones_are_transformers(directory):
    assert_same(directory / TOKENIZER)


def test_the_kinds_differ(tmp_path):
    """The texts tell the tokenizers apart, and each change changes what is read or is cleared."""
    ids = {kind: tuple(tuple(trained(build).encode(text).ids) for text in TEXTS) for kind, build in KINDS.items()}
    assert len(set(ids.values())) == len(KINDS)
    for change in (padded_and_truncated, with_added_tokens, with_template):
        made = trained(word_piece)
        change(made)
        assert tuple(tuple(made.encode(text).ids) for text in TEXTS) != ids["WordPiece"], change
