"""The files of a checkpoint: found here or on the hub, and read with errors that name them."""

import json
import os
import re
from pathlib import Path
from reprlib import Repr
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

from wm_models.checkpoint.errors import CheckpointError
from wm_models.checkpoint.folder import CheckpointFolder

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # of a file of the directory itself

Values = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def open_checkpoint(source: Any, options: dict[str, Any]) -> CheckpointFolder:
    """The opened directory of `source`: a directory's path, a hub model's name, or a directory that is opened already.

    `options`: the hub's among those of `from_pretrained`. Raises `CheckpointError`.
    """
    if isinstance(source, CheckpointFolder):
        return source
    return CheckpointFolder(_local_directory(os.fspath(source), options))


def _local_directory(source: str, options: dict[str, Any]) -> Path:
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
            f"{source}: no such directory, and the hub does not give a model of that name: {one_line(error)}"
        ) from error


def read_index(folder: CheckpointFolder) -> Values | None:
    """What says in which files the tensors are, where those are several."""
    if folder.has(WHOLE) or not folder.has(INDEX):  # transformers reads the whole file first
        return None
    return read_json(folder, INDEX)


def weight_files(folder: CheckpointFolder) -> list[str]:
    """The names of the files that hold the weights, each of them in the directory itself; they are opened."""
    index = read_index(folder)
    names = {WHOLE}
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder.path / INDEX}: has no weight_map; save the checkpoint again")
        for name in weight_map.values():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise CheckpointError(
                    f"{folder.path / INDEX}: {SHORT.repr(name)} lies outside the checkpoint or is no plain name; "
                    "expected files of the directory itself"
                )
        names = set(weight_map.values())
    missing = [name for name in sorted(names) if not folder.has(name)]
    if missing:
        pickled = [name for name in folder.names() if name.endswith(".bin")]
        hint = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{folder.path / missing[0]}: no such file; expected the checkpoint's weights{hint}")
    return sorted(names)


def stored_shapes(folder: CheckpointFolder) -> Shapes:
    """Every stored tensor's shape, by name."""
    shapes: Shapes = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder.link(name), framework="pt") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kind for a header, OSError for the rest
            raise CheckpointError(
                f"{folder.path / name}: truncated or damaged ({one_line(error)}); copy or download it again"
            ) from error
    return shapes


def read_json(folder: CheckpointFolder, name: str) -> Values:
    """A JSON file's object. Raises `CheckpointError`."""
    path = folder.path / name
    if not folder.has(name):
        raise CheckpointError(f"{path}: no such file; expected a checkpoint directory with a config.json")
    try:
        values = json.loads(folder.read(name).decode())
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is a {type(values).__name__}; expected a JSON object")
    return values


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def shown(name: str) -> str:
    """A stored tensor's name, as it is where it is one that a model could have."""
    return name if len(name) <= 200 and name.isprintable() else SHORT.repr(name)


SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 60
