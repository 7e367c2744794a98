"""Where a model comes from: a checkpoint directory, a hub model, the shipped one, or a preset's name."""

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from export.errors import ExportError
from runtime.artifact.integrity import file_hash
from wm_models import (
    PRESETS,
    CheemsConfig,
    CheemsForCausalLM,
    DogeForCausalLM,
    DogeForSequenceClassification,
    create,
)
from wm_models.checkpoint.files import CONFIG, one_line, open_checkpoint, read_json
from wm_models.checkpoint.folder import CheckpointFolder
from wm_models.checkpoint.formats import config_class
from wm_models.checkpoint.loader import CLASSIFIER, find_checkpoint
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead
from wm_models.presets import has_tokenizer
from wm_models.shipped import ASSETS, SHIPPED_CHECKPOINTS, resolve_checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

ADAPTER, ADAPTER_WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base_model_name_or_path"

log = logging.getLogger(__name__)


class Source:
    """What a model is made of: an opened checkpoint, or a preset's name and the seed of its random weights.

    A directory with PEFT's adapter is a source over another one, its `base`, which adapter_config.json names.

    The checkpoint's directory and files are opened once, so that the model, its texts and its hashes are of the same
    bytes, whatever is renamed meanwhile. `name`: a directory, a shipped model's name, a preset's or a hub model's; a
    directory of such a name wins. Raises `ExportError` or `wm_models.CheckpointError`.
    """

    def __init__(self, name: str, seed: int = 0):
        self.name, self.seed = name, seed
        place = resolve_checkpoint(name)
        self.folder: CheckpointFolder | None = None
        self.base: Source | None = None
        if os.path.isdir(place) or place not in PRESETS:
            if not os.path.isdir(place) and "/" not in place:
                raise ExportError(
                    f"{place}: no such directory, and no model; there are {', '.join([*SHIPPED_CHECKPOINTS, *PRESETS])}"
                )
            self.folder = open_checkpoint(place, {})
            if _is_adapter(self.folder):
                self.base = Source(_base_name(self.folder), seed)
        what = f"preset, seed {seed}" if self.folder is None else f"checkpoint in {self.folder.path}"
        log.info("source %s: %s", name, what)

    def is_classifier(self) -> bool:
        """Whether config.json's `architectures` says so, an adapter's that of its base."""
        if self.base is not None:
            return self.base.is_classifier()
        if self.folder is None:
            return False
        names = read_json(self.folder, CONFIG).get("architectures")
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

    def load_model(self) -> DecoderWithHead:
        """The eager model in float32 and evaluation mode: a classifier where `is_classifier`."""
        if self.folder is None:
            return create(self.name, self.seed)
        if self.base is not None:
            return _merge(self.base.load_model(), self.folder)
        values = read_json(self.folder, CONFIG)
        hybrid = config_class(values.get("model_type")) is CheemsConfig
        model_class: type[DecoderWithHead] = CheemsForCausalLM if hybrid else DogeForCausalLM
        if self.is_classifier():
            if hybrid:
                raise ExportError(f"{self.name}: is a classifier of Cheems, and there is none; expected one of Doge")
            model_class = DogeForSequenceClassification
            if CLASSIFIER not in find_checkpoint(model_class, self.folder, {}).names:
                raise ExportError(
                    f"{self.name}: is a language model without a classifier's {CLASSIFIER}; train one first"
                )
        return model_class.from_pretrained(self.folder, dtype=torch.float32).eval()

    def read_text(self, name: str) -> bytes | None:
        """What one of `TOKENIZER_FILES` has, if there is one; an adapter's own goes before its base's."""
        shipped = self.folder is None and has_tokenizer(self.name)
        folder = CheckpointFolder(ASSETS) if shipped else self.folder
        if folder is not None and folder.has(name):
            return folder.read(name)
        return None if self.base is None else self.base.read_text(name)

    def copy_texts(self, model: DecoderWithHead, out: Path) -> None:
        """Write config.json, and copy the tokenizer's and the generation's files where the source has them."""
        model.config.save_pretrained(out)
        for name in TOKENIZER_FILES:
            text = self.read_text(name)
            if text is not None:
                (out / name).write_bytes(text)
        config = model.generation_config if isinstance(model, DecoderForCausalLM) else None
        if not (out / "generation_config.json").exists() and config is not None:
            config.save_pretrained(out)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every file of the checkpoint that was opened, by name; none for a preset.

        Raises `wm_models.CheckpointError` where one of them was written to since.
        """
        if self.folder is None:
            return {}
        found = {name: file_hash(Path(self.folder.link(name))) for name in self.folder.opened()}
        self.folder.check_unchanged()
        if self.base is not None:
            found |= {f"{self.base.name}/{name}": value for name, value in self.base.hashes().items()}
        return found


def _is_adapter(folder: CheckpointFolder) -> bool:
    """Whether the directory holds a PEFT adapter, whose files are then opened. Raises `ExportError` for half of one."""
    if folder.has(CONFIG) or not folder.has(ADAPTER):
        return False
    if not folder.has(ADAPTER_WEIGHTS):
        raise ExportError(f"{folder.path}: is a PEFT adapter without {ADAPTER_WEIGHTS}; save it with save_pretrained")
    return True


def _base_name(adapter: CheckpointFolder) -> str:
    """The source that the adapter was trained over; a relative path is one of the working directory."""
    base = read_json(adapter, ADAPTER).get(BASE)
    if not isinstance(base, str) or not base:
        raise ExportError(f"{adapter.path / ADAPTER}: {BASE} is {base!r}; expected the checkpoint it is for")
    return base


def _merge(model: DecoderWithHead, adapter: CheckpointFolder) -> DecoderWithHead:
    """The model with the adapter's changes in its weights."""
    if find_spec("peft") is None:
        raise ExportError(f"{adapter.path}: is a PEFT adapter; pip install 'wm-models[tune]' to read it")
    peft: Any = import_module("peft")
    with adapter.view() as directory:
        try:
            merged = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
        except Exception as error:  # PEFT checks few values, and the others fail where they are used
            reason = one_line(error)[:300]
            raise ExportError(f"{adapter.path}: does not fit {model.config.name_or_path}: {reason}") from error
    return merged.eval()


def is_local(source: str) -> bool:
    """Whether `source` can be loaded without a hub: a directory, a shipped model or a preset. An adapter's base must
    be local too."""
    if not os.path.isdir(source):
        return source in SHIPPED_CHECKPOINTS or source in PRESETS
    folder = CheckpointFolder(Path(source))
    return not _is_adapter(folder) or is_local(_base_name(folder))
