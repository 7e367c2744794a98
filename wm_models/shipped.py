"""What the package brings along: the presets' tokenizer, and a small trained model with its own."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
TRAINED = "doge-3m"


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The presets' tokenizer: 32768 ids, trained on the Python standard library's sources."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS)


def shipped_checkpoint() -> Path:
    """The checkpoint directory of doge-3m, trained by the recipe of that name on the standard library's sources."""
    return ASSETS / TRAINED
