"""The tokenizer that the presets use."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The presets' tokenizer: 32768 ids, trained on the Python standard library's sources."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS)
