"""Where a model comes from: a checkpoint directory, a hub model, the shipped one, or a preset's name."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from export.errors import ExportError
from wm_models import (
    PRESETS,
    CheemsConfig,
    CheemsForCausalLM,
    DogeForCausalLM,
    DogeForSequenceClassification,
    create,
    shipped_checkpoint,
)
from wm_models.checkpoint.formats import config_class
from wm_models.checkpoint.loader import CLASSIFIER, find_checkpoint
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead
from wm_models.presets import has_tokenizer
from wm_models.shipped import ASSETS, TRAINED

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_model(source: str, seed: int) -> DecoderWithHead:
    """The eager model in float32 and evaluation mode: a classifier where config.json's `architectures` says so.

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
        values = PreTrainedConfig.get_config_dict(source)[0]
    except OSError:  # the loader says what is wrong
        values = {}
    hybrid, names = config_class(values.get("model_type")) is CheemsConfig, values.get("architectures")
    model_class: type[DecoderWithHead] = CheemsForCausalLM if hybrid else DogeForCausalLM
    if isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names):
        if hybrid:
            raise ExportError(f"{source}: is a classifier of Cheems, and there is none; expected one of Doge")
        model_class = DogeForSequenceClassification
        if CLASSIFIER not in find_checkpoint(model_class, source, {}).names:
            raise ExportError(f"{source}: is a language model without a classifier's {CLASSIFIER}; train one first")
    return model_class.from_pretrained(source, dtype=torch.float32).eval()


def copy_texts(model: DecoderWithHead, source: str, out: Path) -> None:
    """Write config.json, and copy the tokenizer's and the generation's files where the source has them."""
    model.config.save_pretrained(out)
    directory = Path(_resolve(source))
    if not directory.is_dir() and source in PRESETS and has_tokenizer(source):
        directory = ASSETS
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            (out / name).write_bytes((directory / name).read_bytes())
    config = model.generation_config if isinstance(model, DecoderForCausalLM) else None
    if not (out / "generation_config.json").exists() and config is not None:
        config.save_pretrained(out)


def _resolve(source: str) -> str:
    return str(shipped_checkpoint()) if source == TRAINED and not os.path.isdir(source) else source


def is_local(source: str) -> bool:
    """Whether `source` can be loaded without a hub: a directory, the shipped model or a preset."""
    return source == TRAINED or source in PRESETS or os.path.isdir(source)
