"""Read an artifact directory, and believe nothing in it that was not checked.

B batch, C cache capacity, V vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError

SCHEMA = 1
INPUTS = ("input_ids", "cache_lengths", "sequence_lengths")
NEXT_IDS = "next_ids"  # an engine's output beside the graph's own: the likeliest tokens
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class State:
    """One cache: its names in the graph, and its shape, in which "batch" and "capacity" stand for B and C."""

    input: str
    output: str
    shape: tuple[int | str, ...]
    dtype: str

    def sized(self, batch: int, capacity: int) -> tuple[int, ...]:
        names = {"batch": batch, "capacity": capacity}
        return tuple(names[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class Graph:
    """`cpu_file` is what ONNX Runtime runs on a CPU: `file`, or the same graph without kernels a CPU lacks."""

    file: str
    cpu_file: str
    dtype: str
    logits: str
    vocabulary: int
    max_batch: int
    max_length: int
    capacities: tuple[int, ...]
    states: tuple[State, ...]


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: every listed file has the size and the hash that the manifest gives."""

    path: Path
    model_type: str
    parameters: int
    graph: Graph
    files: dict[str, File]
    verified: bool

    def read_json(self, name: str) -> dict[str, Any]:
        """A listed JSON file's object; empty where the artifact has no such file."""
        if name not in self.files:
            return {}
        return _object(_parse(self.path / name), self.path / name)


def read_artifact(directory: Path, allow_unverified: bool = False) -> Artifact:
    """The artifact in `directory`. Raises `ArtifactError`."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory; expected an artifact written by wm-export")
    manifest_path = directory / "manifest.json"
    if not manifest_path.is_file():
        raise ArtifactError(f"{directory}: has no manifest.json, so it is no artifact, or its export did not finish")
    manifest = _Fields(_object(_parse(manifest_path), manifest_path), str(manifest_path))
    schema = manifest.get("schema", int)
    if schema > SCHEMA:
        raise ArtifactError(
            f"{manifest_path}: has schema {schema}; this runtime reads up to {SCHEMA}, so upgrade wm-models"
        )
    files = {name: _file(manifest.sub("files").sub(name)) for name in manifest.get("files", dict)}
    artifact = Artifact(
        directory,
        manifest.sub("model").get("type", str),
        manifest.sub("model").get("parameters", int),
        _graph(manifest.sub("graph")),
        files,
        manifest.get("verified", bool),
    )
    for graph in (artifact.graph.file, artifact.graph.cpu_file):
        if graph not in files:
            raise ArtifactError(f"{manifest_path}: its graph {graph!r} is not among its files")
    for name, file in files.items():
        _check_file(directory, name, file)
    if not (artifact.verified or allow_unverified):
        raise ArtifactError(
            f"{directory}: failed or lacks its verification; repeat it with wm-export verify, "
            "or load it with allow_unverified=True"
        )
    return artifact


class _Fields:
    """A JSON object whose fields are taken with a type, and complain by name."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, name: str, kind: type) -> Any:
        value = self.values.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "nothing" if name not in self.values else type(value).__name__
            raise ArtifactError(f"{self.where}: {name} is {found}; expected {kind.__name__}; export again")
        return value

    def sub(self, name: str) -> "_Fields":
        return _Fields(self.get(name, dict), f"{self.where}: {name}")

    def positive(self, name: str) -> int:
        value = self.get(name, int)
        if value < 1:
            raise ArtifactError(f"{self.where}: {name} is {value}; expected at least 1; export again")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in choices:
            raise ArtifactError(f"{self.where}: {name} is {value!r}; expected one of {', '.join(choices)}")
        return value


def _graph(fields: _Fields) -> Graph:
    capacities = fields.get("capacities", list)
    max_length = fields.positive("max_length")
    increasing = all(isinstance(c, int) and c > 0 for c in capacities) and capacities == sorted(set(capacities))
    if not capacities or not increasing or capacities[-1] != max_length:
        raise ArtifactError(f"{fields.where}: capacities are {capacities}; expected rising sizes up to {max_length}")
    states = []
    for index, value in enumerate(fields.get("states", list)):
        where = f"{fields.where}: states[{index}]"
        state = _Fields(_object(value, where), where)
        shape = state.get("shape", list)
        if not all((isinstance(d, int) and d > 0) or d in ("batch", "capacity") for d in shape):
            raise ArtifactError(f"{where}: shape is {shape}; expected sizes, 'batch' and 'capacity'")
        states.append(
            State(state.get("input", str), state.get("output", str), tuple(shape), state.one_of("dtype", DTYPES))
        )
    return Graph(
        fields.get("file", str),
        fields.get("cpu_file", str),
        fields.one_of("dtype", DTYPES),
        fields.one_of("logits", ("last", "all")),
        fields.positive("vocabulary"),
        fields.positive("max_batch"),
        max_length,
        tuple(capacities),
        tuple(states),
    )


def _file(fields: _Fields) -> File:
    return File(fields.get("size", int), fields.get("sha256", str))


def _check_file(directory: Path, name: str, file: File) -> None:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.resolve().parent != directory.resolve():
        raise ArtifactError(f"{path}: lies outside the artifact; expected a file of the directory itself")
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, though the manifest lists it; export again")
    size = path.stat().st_size
    if size != file.size:
        raise ArtifactError(f"{path}: has {size} bytes; the manifest says {file.size}; export or copy it again")
    digest = file_hash(path)
    if digest != file.sha256:
        raise ArtifactError(
            f"{path}: SHA-256 is {digest[:12]}…; the manifest says {file.sha256[:12]}…; export or copy it again"
        )


def file_hash(path: Path) -> str:
    """A file's SHA-256, hexadecimal, without reading it into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no JSON: {error}") from error


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: is {type(value).__name__}; expected a JSON object")
    return value
