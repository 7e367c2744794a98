"""A byte-level BPE tokenizer: the shipped one, and the command that trained it.

python -m wm_models.train_tokenizer --out DIR [--vocabulary 32768] [PATH …]
"""

import argparse
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
VOCABULARY = 32768


def train_tokenizer(files: Iterable[Path], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` ids over the UTF-8 text of `files`; ids 0, 1 and 2 begin, end and pad a text.

    Raises OSError for a file that cannot be read, ValueError where the text is too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocabulary}; train on more of it")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def standard_library() -> list[Path]:
    """The standard library's own sources, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)


def _sources(paths: list[Path]) -> list[Path]:
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return [file for file in files if file.is_file()] if paths else standard_library()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wm_models.train_tokenizer", description="Train a byte-level BPE.")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders of .py; default: the standard library")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    options = parser.parse_args()
    try:
        for path in options.paths:
            if not path.exists():
                raise ValueError(f"{path}: no such file or directory")
        train_tokenizer(_sources(options.paths), options.vocabulary).save_pretrained(options.out)
    except (OSError, ValueError) as error:
        print(f"wm_models.train_tokenizer: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
