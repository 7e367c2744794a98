"""Where a model comes from: a checkpoint directory, a hub model, the shipped one, or a preset's name."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from wm_models import (
    PRESETS,
    CheemsConfig,
    CheemsForCausalLM,
    DogeForCausalLM,
    create,
    shipped_checkpoint,
)
from wm_models.decoder import DecoderForCausalLM
from wm_models.shipped import ASSETS, TRAINED

from .errors import ExportError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_model(source: str, seed: int) -> DecoderForCausalLM:
    """The eager model in float32 and evaluation mode.

    `source` is a directory, the shipped model's name, or a preset's for random weights from `seed`; a directory of
    such a name wins.
    Raises `ExportError` or `wm_models.CheckpointError`.
    """
    source = _resolve(source)
    if not os.path.isdir(source) and source in PRESETS:
        return create(source, seed)
    if not os.path.isdir(source) and "/" not in source:
        raise ExportError(f"{source}: no such directory, and no model; there are {', '.join([TRAINED, *PRESETS])}")
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError:  # the loader says what is wrong
        model_type = None
    model_class = CheemsForCausalLM if model_type == CheemsConfig.model_type else DogeForCausalLM
    return model_class.from_pretrained(source, dtype=torch.float32).eval()


def copy_texts(model: DecoderForCausalLM, source: str, out: Path) -> None:
    """Write config.json, and copy the tokenizer's and the generation's files where the source has them."""
    model.config.save_pretrained(out)
    directory = Path(_resolve(source))
    if not directory.is_dir() and source in PRESETS:
        directory = ASSETS
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            (out / name).write_bytes((directory / name).read_bytes())
    if not (out / "generation_config.json").exists() and model.generation_config is not None:
        model.generation_config.save_pretrained(out)


def _resolve(source: str) -> str:
    return str(shipped_checkpoint()) if source == TRAINED and not os.path.isdir(source) else source
