"""The files of a checkpoint directory: found, kept to the directory itself, and read with errors that name them."""

import json
import os
import re
from pathlib import Path
from reprlib import Repr
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # of a file of the directory itself

Values = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not of this model; one line that names what is wrong, all of it."""


def local_directory(source: str, options: dict[str, Any]) -> Path:
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


def read_index(directory: Path) -> Values | None:
    """What says in which files the tensors are, where those are several."""
    if not (directory / INDEX).exists() or (directory / WHOLE).exists():  # transformers reads the whole file first
        return None
    return read_json(directory, INDEX)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, each of them in the directory itself."""
    index = read_index(directory)
    if index is None:
        return [own_file(directory, WHOLE)]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / INDEX}: has no weight_map; save the checkpoint again")
    for name in weight_map.values():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise CheckpointError(
                f"{directory / INDEX}: {SHORT.repr(name)} lies outside the checkpoint or is no plain name; "
                "expected files of the directory itself"
            )
    return [own_file(directory, name) for name in sorted(set(weight_map.values()))]


def own_file(directory: Path, name: str) -> Path:
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


def stored_shapes(directory: Path) -> Shapes:
    """Every stored tensor's shape, by name."""
    shapes: Shapes = {}
    for path in weight_files(directory):
        if not path.exists():
            pickled = sorted(file.name for file in directory.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{path}: no such file; expected the checkpoint's weights{hint}")
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kind for a header, OSError for the rest
            raise CheckpointError(
                f"{path}: truncated or damaged ({one_line(error)}); copy or download it again"
            ) from error
    return shapes


def read_json(directory: Path, name: str) -> Values:
    path = own_file(directory, name)
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


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def shown(name: str) -> str:
    """A stored tensor's name, as it is where it is one that a model could have."""
    return name if len(name) <= 200 and name.isprintable() else SHORT.repr(name)


SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 60
