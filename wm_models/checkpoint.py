"""Is this directory a checkpoint of that model? Answered before a weight is read.

Every tensor's name and shape is in the headers of the safetensors files, so all that is wrong can be named at once.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration import DogeConfig

HEAD = "lm_head.weight"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not of this model; one line that names what is wrong, all of it."""


def checked_directory(model_class: type[PreTrainedModel], source: Any, options: dict[str, Any]) -> Any:
    """`source` as a local directory whose checkpoint fits `model_class`.

    `options` are `from_pretrained`'s: the hub's (`revision`, `token`, `cache_dir`, `local_files_only`), `config`, and
    `state_dict`, with which no directory is looked at. Raises `CheckpointError`.
    """
    if source is None or options.get("state_dict") is not None:
        return source
    directory = _local(os.fspath(source), options)
    expected, tied = _expected_shapes(model_class, directory, options)
    found = _stored_shapes(directory)
    optional = {HEAD} if tied else set()
    prefix = f"{model_class.base_model_prefix}."
    if not any(name.startswith(prefix) for name in expected):  # the bare model, out of a whole one
        if any(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): shape for name, shape in found.items() if name != HEAD}
    elif not any(name.startswith(prefix) for name in found):  # the whole model, out of a bare one
        found = {prefix + name if prefix + name in expected else name: shape for name, shape in found.items()}
    _compare(directory, found, expected, optional)
    return str(directory)


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


def _config_values(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    values = _read_json(path)
    if values.get("model_type") != DogeConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {values.get('model_type')!r}, so this is not a Doge checkpoint; expected 'doge'"
        )
    return values


def _expected_shapes(
    model_class: type[PreTrainedModel], directory: Path, options: dict[str, Any]
) -> tuple[Shapes, bool]:
    """Every tensor's shape by name in the model that `from_pretrained` will build, and whether its head is tied."""
    values = _config_values(directory)
    config = options.get("config")
    # transformers sets a field given as an option over config.json's, so it decides the shapes too
    fields = {name: options[name] for name in DogeConfig.__dataclass_fields__.keys() & options if name != "dtype"}
    try:
        if config is None:
            config = DogeConfig.from_dict(values, **fields)
        elif not isinstance(config, PreTrainedConfig):
            config = DogeConfig.from_pretrained(config, **fields)
        with torch.device("meta"):
            model = model_class._from_config(config)
    except Exception as error:  # a value the config lets pass fails in the module that uses it, in its own way
        kind = "" if isinstance(error, ValueError) else f"no model has these values: {type(error).__name__}: "
        raise CheckpointError(f"{directory / 'config.json'}: {kind}{_one_line(error)}") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, config.tie_word_embeddings


def _stored_shapes(directory: Path) -> Shapes:
    """Every stored tensor's shape, by name."""
    if (directory / INDEX).exists() and not (directory / WHOLE).exists():  # transformers reads the whole file first
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX}: has no weight_map; save the checkpoint again")
        files = sorted({str(name) for name in weight_map.values()})
    else:
        files = [WHOLE]
    shapes: Shapes = {}
    for name in files:
        path = directory / name
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


def _compare(directory: Path, found: Shapes, expected: Shapes, optional: set[str]) -> None:
    """Raise one `CheckpointError` that lists every missing, unexpected and wrongly shaped tensor."""
    missing = sorted(expected.keys() - found.keys() - optional)
    unexpected = sorted(found.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    faults = []
    if missing:
        faults.append(f"missing {len(missing)}: {', '.join(missing)}")
    if unexpected:
        faults.append(f"unexpected {len(unexpected)}: {', '.join(unexpected)}")
    if wrong:
        shapes = (f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in wrong)
        faults.append(f"wrong shape {len(wrong)}: {'; '.join(shapes)}")
    if faults:
        raise CheckpointError(f"{directory}: its tensors do not fit config.json: {'. '.join(faults)}")


def _read_json(path: Path) -> dict[str, Any]:
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
