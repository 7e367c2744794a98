"""What a stored checkpoint is, and how it loads: the one place that knows how other models spell their tensors.

Every tensor's name and shape is in the headers of the safetensors files, so a checkpoint is recognised, and all that is
wrong with it is named, before a weight is read. A generation differs from this project's own spelling in parts of names
and in its config's fields; the numbers are the same but where `convert` says otherwise.

D hidden size, H query heads, K key/value heads, n and r of the experts' keys.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from wm_models.configuration import EVERY_KEY, CheemsConfig, DogeConfig

HEAD, CLASSIFIER = "lm_head.weight", "score.weight"
CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # of a file of the directory itself

EXPERT_TENSORS = r"\.mlp\.(down_embed|up_embed|router_gate|queries|keys)(\.weight)?$"

Values = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not of this model; one line that names what is wrong, all of it."""


@dataclass(frozen=True)
class Generation:
    """One published spelling of a model.

    `spelling` maps parts of this project's tensor names (between dots) to theirs; `fields` maps their config to this
    project's; `convert` changes the tensors, already under this project's names, that mean something else there.
    """

    name: str
    model_type: str
    config_class: type[DogeConfig] = DogeConfig
    spelling: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[Values], Values] = dict
    convert: Callable[[State, Values], None] | None = None

    def spell(self, name: str) -> str:
        """This project's tensor name, as the generation writes it."""
        return ".".join(self.spelling.get(part, part) for part in name.split("."))


def _rename(values: Values, **names: str) -> Values:
    """`values` with each field renamed where it is there."""
    return {names.get(name, name): value for name, value in values.items()}


def _fields_2025_08(values: Values) -> Values:
    return {**values, "num_bias_heads": values.get("num_attention_heads"), "query_key_norm": False}


def _fields_2025_04(values: Values) -> Values:
    values = _rename(values, hidden_bias="attention_bias")
    return {**_fields_2025_08(values), "mlp_bias": values.get("attention_bias", False)}


def _fields_2025_01(values: Values) -> Values:
    values = _rename(values, num_cdmoe_experts="num_experts", num_cdmoe_heads="num_expert_heads")
    values.pop("is_causal", None)  # see _convert_2025_01
    rope = values.setdefault("rope_scaling", {"rope_type": "dynamic", "factor": 4.0})
    if rope and rope.get("original_max_position_embeddings") == values.get("max_position_embeddings"):
        values["rope_scaling"] = {k: v for k, v in rope.items() if k != "original_max_position_embeddings"}
    per_head = values.pop("num_cdmoe_experts_per_head", None)
    if per_head is not None:
        values["num_experts_per_tok"] = per_head * values.get("num_expert_heads", 1)
    return {**_fields_2025_04(values), "keep_window_size": EVERY_KEY, "expert_routing": "product_keys"}


def _convert_2025_01(state: State, values: Values) -> None:
    """`is_causal` turned the bias off. With A = 0 every bias is one, which the softmax cancels."""
    if values.get("is_causal"):
        for name in state:
            if name.endswith("self_attn.A"):
                state[name] = torch.zeros_like(state[name])


def _convert_cheems(state: State, values: Values) -> None:
    """A itself was stored, where this project stores log(-A)."""
    del values
    for name in [name for name in state if name.endswith("ssd.A_log")]:
        if not (state[name] < 0).all():
            raise ValueError(
                f"{name.removesuffix('_log')} reaches {state[name].max().item():g}; expected numbers below 0, "
                "for with others the state grows without bound: train it with negative ones"
            )
        state[name] = (-state[name]).log()


OLD_SPELLING = {
    "embed_tokens": "word_embed",
    "norm": "final_layernorm",
    "input_layernorm": "pre_layernorm",
    "input_residual": "pre_residual.weight",
    "post_attention_layernorm": "post_layernorm",
    "post_attention_residual": "post_residual.weight",
    "mlp": "feed_forward",
    "score": "classifier",
}

CHEEMS_SPELLING = {
    **OLD_SPELLING,
    "self_attn": "attn",
    "A_log": "A",
    "input_layernorm": "pre_sequence_layernorm",
    "input_residual": "post_sequence_residual.weight",
    "post_attention_layernorm": "pre_state_layernorm",
    "post_attention_residual": "post_state_residual.weight",
}

# Where two generations have the same tensors (2025-01 and 2025-04, without experts) the config tells them apart.
GENERATIONS = (
    Generation("wm-models", DogeConfig.model_type),
    Generation("transformers", "doge"),
    Generation("2025-08", "doge", fields=_fields_2025_08),
    Generation("2025-04", "doge", spelling=OLD_SPELLING, fields=_fields_2025_04),
    Generation("2025-01", "doge", spelling=OLD_SPELLING, fields=_fields_2025_01, convert=_convert_2025_01),
    Generation("wm-models", "cheems", CheemsConfig),
    Generation("2025-01", "cheems", CheemsConfig, CHEEMS_SPELLING, _fields_2025_01, _convert_cheems),
)
FIELDS_OF_2025_01 = ("dynamic_mask_ratio", "is_causal", "num_cdmoe_experts", "rope_scaling")
FIELDS_OF_2025_04 = ("keep_window_size", "num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose tensors were found to be those of a model."""

    directory: Path
    generation: Generation
    config: DogeConfig
    names: dict[str, str]  # stored name of each tensor to load, by the model's name
    inherited: frozenset[str]  # tensors of experts that an MLP checkpoint has not
    values: Values  # config.json

    @property
    def is_plain(self) -> bool:
        """Whether transformers can load the files as they are; it takes no index without metadata."""
        own = not self.generation.spelling and self.generation.convert is None and not self.inherited
        index = _index(self.directory)
        return own and (index is None or isinstance(index.get("metadata"), dict))

    def state(self) -> State:
        """Every tensor under the model's own name; experts that join an MLP start with nothing to add."""
        stored: State = {}
        for path in _files(self.directory):
            with safe_open(path, framework="pt") as file:
                stored.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        state = {name: stored[key] for name, key in self.names.items()}
        if self.generation.convert is not None:
            try:
                self.generation.convert(state, self.values)
            except ValueError as error:
                raise CheckpointError(f"{self.directory}: {error}") from error
        for name in self.inherited:
            if name.endswith("up_embed.weight"):
                state[name] = torch.zeros(self.config.num_experts, self.config.hidden_size)
        return state


def find_checkpoint(model_class: type[PreTrainedModel], source: Any, options: dict[str, Any]) -> Checkpoint:
    """Recognise the checkpoint in `source`, a local directory or a hub model, as one of `model_class`.

    `options` are `from_pretrained`'s: the hub's (`revision`, `token`, `cache_dir`, `local_files_only`), `config`, and
    fields that are set over config.json's. Raises `CheckpointError`.
    """
    directory = _local(os.fspath(source), options)
    values = _read_json(directory, CONFIG)
    stored = _stored_shapes(directory)
    candidates = _candidates(model_class, directory, values, stored)
    near: list[tuple[int, Generation, str]] = []
    for generation in candidates:
        config, expected = _expected(model_class, directory, generation.fields(values), options)
        names, optional = _names(model_class, generation, expected, config, stored)
        inherited: frozenset[str] = frozenset()
        if config.is_moe and not values.get("is_moe", False):
            inherited = frozenset(n for n in expected if re.search(EXPERT_TENSORS, n) and names[n] not in stored)
        found, faults = _compare(names, expected, stored, optional | inherited)
        if not found:
            loaded = {name: key for name, key in names.items() if key in stored}
            checkpoint = Checkpoint(directory, generation, config, loaded, inherited, values)
            note = f", whose MLPs get {config.num_experts} experts" if inherited else ""
            log.info("%s: a checkpoint of generation %s%s", directory, generation.name, note)
            return checkpoint
        near.append((found, generation, faults))
    _, generation, faults = min(near, key=lambda entry: entry[0])
    raise CheckpointError(
        f"{directory}: its tensors do not fit config.json; the nearest generation is {generation.name}: {faults}"
    )


def field_options(model_class: type[PreTrainedModel], options: dict[str, Any]) -> Values:
    """The `options` of `from_pretrained` that are fields of the model's config."""
    names = {"num_labels", *model_class.config_class.__dataclass_fields__} - {"dtype"}  # type: ignore[union-attr]
    return {name: options[name] for name in names & options.keys()}


def _candidates(
    model_class: type[PreTrainedModel], directory: Path, values: Values, stored: Shapes
) -> list[Generation]:
    """The generations that config.json may describe, the likelier first."""
    model_type = values.get("model_type")
    known = [generation for generation in GENERATIONS if generation.config_class is model_class.config_class]
    found = [generation for generation in known if generation.model_type == model_type]
    if not found:
        expected = " or ".join(sorted({repr(generation.model_type) for generation in known}))
        raise CheckpointError(
            f"{directory / CONFIG}: model_type is {model_type!r}, so this is not a "
            f"{model_class.__name__.removesuffix('ForCausalLM')} checkpoint; expected {expected}"
        )
    older, newer = (
        sum(values.get(name) is not None for name in names) for names in (FIELDS_OF_2025_01, FIELDS_OF_2025_04)
    )
    parts = {part for name in stored for part in name.split(".")}

    def unlikely(generation: Generation) -> tuple[bool, bool]:
        return generation.spell("embed_tokens") not in parts, generation.name == "2025-04" and older > newer

    return sorted(found, key=unlikely)


def _expected(
    model_class: type[PreTrainedModel], directory: Path, values: Values, options: dict[str, Any]
) -> tuple[DogeConfig, Shapes]:
    """The config and every tensor's shape by name of the model that is to be built.

    A field that is given as an option goes over config.json's, and so decides the shapes too.
    """
    given = options.get("config")
    config_class: Any = model_class.config_class
    values = {name: value for name, value in values.items() if name not in ("auto_map", "model_type")}
    fields = field_options(model_class, options)
    try:
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
        raise CheckpointError(f"{directory / CONFIG}: {kind}{_one_line(error)}") from error
    return config, {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _names(
    model_class: type[PreTrainedModel], generation: Generation, expected: Shapes, config: DogeConfig, stored: Shapes
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
        names[name] = generation.spell(name if is_head else prefix + bare if whole else bare)
    optional = {HEAD} if config.tie_word_embeddings else set()
    if HEAD in stored or config.tie_word_embeddings:  # a language model's
        optional.add(CLASSIFIER)
    return names, optional


def _local(source: str, options: dict[str, Any]) -> Path:
    if os.path.isdir(source):
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise CheckpointError(f"{source}: no such directory; expected one with config.json and {WHOLE}")
    keys = ("revision", "token", "cache_dir", "local_files_only")
    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                **{key: options[key] for key in keys if options.get(key) is not None},
            )
        )
    except Exception as error:  # network, hub and cache fail in many ways, all of them: not to be had
        raise CheckpointError(
            f"{source}: no such directory, and the hub does not give a model of that name: {_one_line(error)}"
        ) from error


def _index(directory: Path) -> Values | None:
    """What says in which files the tensors are, where those are several."""
    if not (directory / INDEX).exists() or (directory / WHOLE).exists():  # transformers reads the whole file first
        return None
    return _read_json(directory, INDEX)


def _files(directory: Path) -> list[Path]:
    """The files that hold the weights, each of them in the directory itself."""
    index = _index(directory)
    if index is None:
        return [_own(directory, WHOLE)]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / INDEX}: has no weight_map; save the checkpoint again")
    for name in weight_map.values():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(
                f"{directory / INDEX}: {_SHORT.repr(name)} lies outside the checkpoint or is no plain name; "
                "expected files of the directory itself"
            )
    return [_own(directory, name) for name in sorted(set(weight_map.values()))]


def _own(directory: Path, name: str) -> Path:
    """A file of the directory, not opened yet. Raises `CheckpointError` where it is a link to elsewhere, or no file.

    The hub's cache keeps every file as a link from `snapshots/*/` to `blobs/` beside it; those are its own.
    """
    path, real = directory / name, directory.resolve()
    roots = [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
    target = Path(os.path.realpath(path))  # which, unlike resolve(), takes a link to itself
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: is a link out of the checkpoint, to {target}; copy the file itself")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no plain file; expected one of the checkpoint's own")
    return path


def _stored_shapes(directory: Path) -> Shapes:
    """Every stored tensor's shape, by name."""
    shapes: Shapes = {}
    for path in _files(directory):
        if not path.exists():
            pickled = sorted(file.name for file in directory.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{path}: no such file; expected the checkpoint's weights{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kind for a header, OSError for the rest
            raise CheckpointError(
                f"{path}: truncated or damaged ({_one_line(error)}); copy or download it again"
            ) from error
    return shapes


def _compare(
    names: dict[str, str], expected: Shapes, stored: Shapes, optional: set[str] | frozenset[str]
) -> tuple[int, str]:
    """How many tensors are missing, unexpected or wrongly shaped, and which, all of them."""
    needless = {HEAD} if HEAD not in expected else set()  # a bare model or a classifier has no use for it
    missing = sorted(names[name] for name in expected.keys() - optional if names[name] not in stored)
    unexpected = sorted(_shown(name) for name in stored.keys() - set(names.values()) - needless)
    wrong = [
        f"{names[name]} is {_SHORT.repr(list(stored[names[name]]))}, expected {list(expected[name])}"
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


def _read_json(directory: Path, name: str) -> Values:
    path = _own(directory, name)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint directory with a config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is a {type(values).__name__}; expected a JSON object")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shown(name: str) -> str:
    """A stored tensor's name, as it is where it is one that a model could have."""
    return name if len(name) <= 200 and name.isprintable() else _SHORT.repr(name)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
