"""Recognising a stored checkpoint, and loading it.

Every tensor's name and shape is in the headers of the safetensors files, so a checkpoint is recognised, and all that is
wrong with it is named, before a weight is read.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from wm_models.checkpoint.errors import CheckpointError
from wm_models.checkpoint.files import (
    CONFIG,
    SHORT,
    Shapes,
    Values,
    one_line,
    open_checkpoint,
    read_index,
    read_json,
    shown,
    stored_shapes,
    weight_files,
)
from wm_models.checkpoint.folder import CheckpointFolder
from wm_models.checkpoint.formats import FORMATS, Format, State
from wm_models.configuration import DogeConfig

HEAD, CLASSIFIER = "lm_head.weight", "score.weight"
EXPERT_TENSORS = r"\.mlp\.(down_embed|up_embed|router_gate|queries|keys)(\.weight)?$"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose tensors were found to be those of a model."""

    folder: CheckpointFolder
    format: Format
    config: DogeConfig
    names: dict[str, str]  # stored name of each tensor to load, by the model's name
    inherited: frozenset[str]  # tensors of experts that an MLP checkpoint has not
    values: Values  # config.json

    @property
    def is_plain(self) -> bool:
        """Whether transformers can load the files as they are; it takes no index without metadata."""
        own = not self.format.names and self.format.convert is None and not self.inherited
        index = read_index(self.folder)
        return own and (index is None or isinstance(index.get("metadata"), dict))

    def state(self) -> State:
        """Every tensor under the model's own name; experts that join an MLP start with nothing to add."""
        stored: State = {}
        for file_name in weight_files(self.folder):
            with safe_open(self.folder.link(file_name), framework="pt") as file:
                stored.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        state = {name: stored[key] for name, key in self.names.items()}
        if self.format.convert is not None:
            try:
                self.format.convert(state, self.values)
            except ValueError as error:
                raise CheckpointError(f"{self.folder.path}: {error}") from error
        for name in self.inherited:
            if name.endswith("up_embed.weight"):
                state[name] = torch.zeros(self.config.num_experts, self.config.hidden_size)
        return state


def find_checkpoint(model_class: type[PreTrainedModel], source: Any, options: dict[str, Any]) -> Checkpoint:
    """Recognise the checkpoint in `source`, a directory, opened or not, or a hub model, as one of `model_class`.

    `options` are `from_pretrained`'s: the hub's (`revision`, `token`, `cache_dir`, `local_files_only`), `config`, and
    fields that are set over config.json's. Raises `CheckpointError`.
    """
    try:
        return _recognised(model_class, open_checkpoint(source, options), options)
    except CheckpointError as error:
        log.warning("refused to load a %s: %s", model_class.__name__, error)
        raise


def _recognised(model_class: type[PreTrainedModel], folder: CheckpointFolder, options: dict[str, Any]) -> Checkpoint:
    directory, values, stored = folder.path, read_json(folder, CONFIG), stored_shapes(folder)
    candidates = _candidates(model_class, directory, values, stored)
    near: list[tuple[int, Format, str]] = []
    for format in candidates:
        config, expected = _expected(model_class, directory, format, values, options)
        names, optional = _names(model_class, format, expected, config, stored)
        inherited: frozenset[str] = frozenset()
        if config.is_moe and not values.get("is_moe", False):
            inherited = frozenset(n for n in expected if re.search(EXPERT_TENSORS, n) and names[n] not in stored)
        found, faults = _compare(names, expected, stored, optional | inherited)
        if not found:
            loaded = {name: key for name, key in names.items() if key in stored}
            checkpoint = Checkpoint(folder, format, config, loaded, inherited, values)
            note = f", whose MLPs get {config.num_experts} experts" if inherited else ""
            log.info("%s: a checkpoint of format %s%s", directory, format.name, note)
            return checkpoint
        near.append((found, format, faults))
    _, format, faults = min(near, key=lambda entry: entry[0])
    raise CheckpointError(
        f"{directory}: its tensors do not fit config.json; the nearest format is {format.name}: {faults}"
    )


def field_options(model_class: type[PreTrainedModel], options: dict[str, Any]) -> Values:
    """The `options` of `from_pretrained` that are fields of the model's config."""
    names = {"num_labels", *model_class.config_class.__dataclass_fields__} - {"dtype"}  # type: ignore[union-attr]
    return {name: options[name] for name in names & options.keys()}


def _candidates(model_class: type[PreTrainedModel], directory: Path, values: Values, stored: Shapes) -> list[Format]:
    """The formats that config.json may describe, the likelier first."""
    model_type = values.get("model_type")
    known = [each for each in FORMATS if each.config_class is model_class.config_class]
    found = [each for each in known if each.model_type == model_type]
    if not found:
        expected = " or ".join(sorted({repr(each.model_type) for each in known}))
        raise CheckpointError(
            f"{directory / CONFIG}: model_type is {model_type!r}, so this is not a "
            f"{model_class.__name__.removesuffix('ForCausalLM')} checkpoint; expected {expected}"
        )
    parts = {part for name in stored for part in name.split(".")}

    def rank(known: Format) -> tuple[bool, int]:
        marks = sum(values.get(mark) is not None for mark in known.marks)
        return known.stored_name("embed_tokens") not in parts, -marks

    return sorted(found, key=rank)


def _expected(
    model_class: type[PreTrainedModel], directory: Path, format: Format, values: Values, options: dict[str, Any]
) -> tuple[DogeConfig, Shapes]:
    """The config and every tensor's shape by name of the model that is to be built.

    A field that is given as an option goes over config.json's, and so decides the shapes too.
    """
    given = options.get("config")
    config_class: Any = model_class.config_class
    fields = field_options(model_class, options)
    try:
        values = {k: v for k, v in format.fields(values).items() if k not in ("auto_map", "model_type")}
        config: DogeConfig
        if given is None:
            config = config_class.from_dict({**values, **fields})
        elif isinstance(given, PreTrainedConfig):
            config = given if isinstance(given, DogeConfig) else config_class.from_dict(given.to_dict())
        else:
            config = config_class.from_pretrained(given, **fields)
        with torch.device("meta"):
            model = model_class._from_config(config)
    except Exception as error:  # a value the config lets pass fails in the module that uses it, in its own way
        kind = "" if isinstance(error, ValueError) else f"no model has these values: {type(error).__name__}: "
        raise CheckpointError(f"{directory / CONFIG}: {kind}{one_line(error)}") from error
    return config, {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _names(
    model_class: type[PreTrainedModel], format: Format, expected: Shapes, config: DogeConfig, stored: Shapes
) -> tuple[dict[str, str], set[str]]:
    """The stored name of every expected tensor, and the expected tensors that may be missing.

    A bare model loads out of a whole one's checkpoint and the reverse; a tied head and a new classifier may be missing.
    """
    prefix = f"{model_class.base_model_prefix}."
    whole = any(name.startswith(prefix) for name in stored)
    names = {}
    for name in expected:
        bare = name.removeprefix(prefix)
        is_head = name in (HEAD, CLASSIFIER)
        names[name] = format.stored_name(name if is_head else prefix + bare if whole else bare)
    optional = {HEAD} if config.tie_word_embeddings else set()
    if HEAD in stored or config.tie_word_embeddings:  # a language model's
        optional.add(CLASSIFIER)
    return names, optional


def _compare(
    names: dict[str, str], expected: Shapes, stored: Shapes, optional: set[str] | frozenset[str]
) -> tuple[int, str]:
    """How many tensors are missing, unexpected or wrongly shaped, and which, all of them."""
    needless = {HEAD} if HEAD not in expected else set()  # a bare model or a classifier has no use for it
    missing = sorted(names[name] for name in expected.keys() - optional if names[name] not in stored)
    unexpected = sorted(shown(name) for name in stored.keys() - set(names.values()) - needless)
    wrong = [
        f"{names[name]} is {SHORT.repr(list(stored[names[name]]))}, expected {list(expected[name])}"
        for name in sorted(expected)
        if names[name] in stored and stored[names[name]] != expected[name]
    ]
    faults = []
    if missing:
        faults.append(f"missing {len(missing)}: {', '.join(missing)}")
    if unexpected:
        faults.append(f"unexpected {len(unexpected)}: {', '.join(unexpected)}")
    if wrong:
        faults.append(f"wrong shape {len(wrong)}: {'; '.join(wrong)}")
    return len(missing) + len(unexpected) + len(wrong), ". ".join(faults)
