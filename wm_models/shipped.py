"""What the package brings along: the presets' tokenizer, and two small trained models with their own."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
TRAINED, TUNED = "doge-3m", "doge-3m-instruct"
SHIPPED_CHECKPOINTS = (TRAINED, TUNED)


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The presets' tokenizer: 32768 ids, trained on the Python standard library's sources."""
    return PreTrainedTokenizerFast.from_pretrained(ASSETS)


def resolve_checkpoint(source: str) -> str:
    """The directory of the checkpoint that ships under this name, or `source` as it is where none does.

    A directory of the working directory that has such a name wins.
    """
    shipped = source in SHIPPED_CHECKPOINTS and not Path(source).is_dir()
    return str(shipped_checkpoint(source)) if shipped else source


def shipped_checkpoint(name: str = TRAINED) -> Path:
    """The directory of a checkpoint that ships: doge-3m, trained on the standard library's sources, or
    doge-3m-instruct, which is doge-3m tuned on instructions from their docstrings; each by the recipe of its name.

    Raises ValueError for another name.
    """
    if name not in SHIPPED_CHECKPOINTS:
        raise ValueError(f"{name!r} does not ship; expected one of {', '.join(SHIPPED_CHECKPOINTS)}")
    return ASSETS / name
