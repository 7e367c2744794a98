"""Read an artifact directory, and believe nothing in it that was not checked.

What is read lies in the directory itself and has the size and the SHA-256 that the manifest gives. Of a graph that is
checked too, what it would make ONNX Runtime read and allocate.

B batch, C cache capacity, V vocabulary.
"""

import hashlib
import json
import re
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from reprlib import Repr
from typing import Any

from runtime.artifact.onnx_reader import OnnxFile, OnnxFormatError, Value, read_onnx
from runtime.artifact.signature import check_signature
from runtime.backends.tensorrt_editions import MODULES
from runtime.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
INPUTS = ("input_ids", "cache_lengths", "sequence_lengths")
EVICTED = "dropped_lengths"  # the input that a graph with a window has besides: tokens whose rows were evicted
NEXT_IDS = "next_ids"  # an engine's output beside the graph's own: the argmax of each row of logits
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int8", "int4")
ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # onnx.TensorProto's numbers
DOMAINS = ("", "com.microsoft")  # ONNX's own operators, and ONNX Runtime's

# Far beyond any model, and small enough that reading up to them harms no machine.
MOST_FILES, MOST_STATES, MOST_CAPACITIES, MOST_ENGINES = 256, 1 << 14, 256, 64
MOST_SLOTS, MOST_TOKENS, MOST_LABELS = 1 << 16, 1 << 26, 1 << 20
LARGEST_MANIFEST, LARGEST_TEXT = 4 << 20, 64 << 20  # bytes; texts are what is read whole: JSON files and graphs
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


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
class Window:
    """A cache has `rows` rows at most: the `keep` keys of largest bias, and those that came since they were chosen."""

    keep: int
    rows: int


def input_names(window: Window | None) -> tuple[str, ...]:
    """The graph's inputs but for its states; all are int64, the first (B, S), the others (B)."""
    return INPUTS if window is None else (*INPUTS, EVICTED)


@dataclass(frozen=True)
class Graph:
    """`cpu_file` is what ONNX Runtime runs on a CPU: `file`, or the same graph with operators that suit it better.

    `dtype` is that of caches and logits, and of weights unless they have a `quantization`.
    """

    file: str
    cpu_file: str
    dtype: str
    quantization: str
    logits: str
    vocabulary: int
    max_batch: int
    max_length: int
    capacities: tuple[int, ...]
    states: tuple[State, ...]
    window: Window | None = None
    labels: int | None = None  # of a classifier

    @property
    def logits_width(self) -> int:
        """The logits of a token: one for each id of the vocabulary, or for each label."""
        return self.vocabulary if self.labels is None else self.labels

    @property
    def inputs(self) -> tuple[str, ...]:
        return input_names(self.window)

    @property
    def chunk(self) -> int:
        """The most tokens of a slot in one step."""
        return self.max_length if self.window is None else self.window.rows - self.window.keep

    def rows(self, capacity: int) -> int:
        """The rows that the caches of a slot of `capacity` tokens have."""
        return capacity if self.window is None else min(capacity, self.window.rows)


@dataclass(frozen=True)
class Profile:
    """The smallest, usual and largest numbers of slots and of new tokens of one way to run an engine."""

    name: str
    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]


@dataclass(frozen=True)
class EngineFile:
    """A TensorRT engine beside the graph. `aliased` are the outputs that are written where their input lies."""

    file: str
    builder: str
    version: str
    compute_capabilities: tuple[str, ...]
    capacity: int
    max_batch: int
    profiles: tuple[Profile, ...]
    aliased: frozenset[str]


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: every listed file has the size and the hash that the manifest gives.

    `manifest` is the manifest's text, `texts` that of the other JSON files and of templates, as they were when checked.
    """

    path: Path
    manifest: bytes
    model_type: str
    parameters: int
    graph: Graph
    engines: tuple[EngineFile, ...]
    files: dict[str, File]
    texts: dict[str, bytes]
    verified: bool

    def read_json(self, name: str) -> dict[str, Any]:
        """A listed JSON file's object; empty where the artifact has no such file."""
        if name not in self.texts:
            return {}
        return _object(_parse(self.texts[name], self.path / name), self.path / name)


def read_artifact(
    directory: Path, allow_unverified: bool = False, public_key: str | PathLike[str] | bytes | None = None
) -> Artifact:
    """The artifact in `directory`; with `public_key` (a PEM file, or its bytes) only if its holder signed it.

    Raises `ArtifactError`.
    """
    with open_artifact(directory, allow_unverified, public_key) as artifact:
        return artifact


@contextmanager
def open_artifact(
    directory: Path, allow_unverified: bool = False, public_key: str | PathLike[str] | bytes | None = None
) -> Iterator[Artifact]:
    """As `read_artifact`, but the graphs' weights are hashed while the block runs, which takes half as long as loading.

    All else, their sizes too, is checked before the block, and they by its end: what was made of them is to be used
    after it. With a key their hashes are checked before it too, so nothing computes with bytes that nobody signed.
    """
    artifact, weights = _read_all_but_weights(directory, allow_unverified, public_key)
    with ThreadPoolExecutor(1) as pool:
        hashes = [pool.submit(_check_hash, directory / name, artifact.files[name]) for name in weights]
        if public_key is not None:
            _raise_first(hashes)
        try:
            yield artifact
        finally:  # a wrong hash explains whatever else went wrong
            _raise_first(hashes)


def _raise_first(checks: list[Future[None]]) -> None:
    for check in checks:
        check.result()


def _read_all_but_weights(
    directory: Path, allow_unverified: bool, public_key: str | PathLike[str] | bytes | None
) -> tuple[Artifact, list[str]]:
    """The artifact, and the files of its weights, of which only the sizes are checked."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory; expected an artifact written by wm-export")
    path = directory / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{directory}: has no {MANIFEST}, so it is no artifact, or its export did not finish")
    text = _read(path, _size(path, LARGEST_MANIFEST))
    if public_key is not None:
        check_signature(directory, text, public_key)
    manifest = _Fields(_object(_parse(text, path), path), str(path))
    schema = manifest.get("schema", int)
    if schema > SCHEMA:
        raise ArtifactError(f"{path}: has schema {schema}; this runtime reads up to {SCHEMA}, so upgrade wm-models")
    graph, files = _graph(manifest.sub("graph")), _files(manifest)
    for name in (graph.file, graph.cpu_file):
        if name not in files:
            raise ArtifactError(f"{path}: its graph {_shown(name)} is not among its files")
    engines = tuple(_engine(entry, files) for entry in _engines(manifest))
    _check_bounds(path, graph, sum(file.size for file in files.values()))
    for name, file in files.items():
        _check_size(directory / name, file)
    weights: set[str] = set()
    for name in {graph.file, graph.cpu_file}:
        weights |= _check_graph(directory / name, _checked_text(directory / name, files[name]), graph, files)
    texts = {}
    for name, file in files.items():
        if name.endswith((".json", ".jinja")):
            texts[name] = _checked_text(directory / name, file)
        elif name not in weights:
            _check_hash(directory / name, file)
    model, verified = manifest.sub("model"), manifest.get("verified", bool)
    if not (verified or allow_unverified):
        raise ArtifactError(
            f"{directory}: failed or lacks its verification; repeat it with wm-export verify, "
            "or load it with allow_unverified=True"
        )
    kind, parameters = model.get("type", str), model.get("parameters", int)
    return Artifact(directory, text, kind, parameters, graph, engines, files, texts, verified), sorted(weights)


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

    def sequence(self, name: str, most: int) -> list[Any]:
        value = self.get(name, list)
        if len(value) > most:
            raise ArtifactError(f"{self.where}: {name} has {len(value)} entries; expected up to {most}")
        return value

    def sub(self, name: str) -> "_Fields":
        return _Fields(self.get(name, dict), f"{self.where}: {name}")

    def positive(self, name: str, most: int) -> int:
        value = self.get(name, int)
        if not 1 <= value <= most:
            raise ArtifactError(f"{self.where}: {name} is {_shown(value)}; expected 1 to {most}; export again")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in choices:
            raise ArtifactError(f"{self.where}: {name} is {_shown(value)}; expected one of {', '.join(choices)}")
        return value


def _graph(fields: _Fields) -> Graph:
    capacities = fields.sequence("capacities", MOST_CAPACITIES)
    max_length = fields.positive("max_length", MOST_TOKENS)
    increasing = all(_is_size(size) for size in capacities) and capacities == sorted(set(capacities))
    if not capacities or not increasing or capacities[-1] != max_length:
        raise ArtifactError(
            f"{fields.where}: capacities are {_shown(capacities)}; expected rising sizes up to {max_length}"
        )
    states = []
    for index, value in enumerate(fields.sequence("states", MOST_STATES)):
        where = f"{fields.where}: states[{index}]"
        state = _Fields(_object(value, where), where)
        shape = state.get("shape", list)
        if len(shape) > 8 or not all(_is_size(size) or size in ("batch", "capacity") for size in shape):
            raise ArtifactError(f"{where}: shape is {_shown(shape)}; expected sizes, 'batch' and 'capacity'")
        states.append(
            State(state.get("input", str), state.get("output", str), tuple(shape), state.one_of("dtype", DTYPES))
        )
    return Graph(
        fields.get("file", str),
        fields.get("cpu_file", str),
        fields.one_of("dtype", DTYPES),
        fields.one_of("quantization", QUANTIZATIONS),
        fields.one_of("logits", ("last", "all")),
        fields.positive("vocabulary", 1 << 31),
        fields.positive("max_batch", MOST_SLOTS),
        max_length,
        tuple(capacities),
        tuple(states),
        _window(fields, max_length, states),
        fields.positive("labels", MOST_LABELS) if "labels" in fields.values else None,
    )


def _window(graph: _Fields, max_length: int, states: list[State]) -> Window | None:
    """The graph's window, of which there need not be one: then every layer has a key, a value and a bias cache."""
    if "window" not in graph.values:
        return None
    fields = graph.sub("window")
    rows = fields.positive("rows", max_length)
    keep = fields.positive("keep", rows - 1)
    shapes = {state.input: state.shape for state in states if "capacity" in state.shape}
    for layer in {name.rpartition(".")[0] for name in shapes}:
        found = [shapes.get(f"{layer}.{part}", ()) for part in ("key", "value", "bias")]
        if any(len(s) != 4 or s[:3] != ("batch", found[0][1], "capacity") for s in found) or found[2][3] != 1:
            raise ArtifactError(
                f"{fields.where}: the caches of {_shown(layer)} are no key, value and bias of its heads"
            )
    return Window(keep, rows)


def _engines(manifest: _Fields) -> list[_Fields]:
    """The entries of the manifest's engines, of which there need not be any."""
    entries = manifest.sequence("engines", MOST_ENGINES) if "engines" in manifest.values else []
    wheres = [f"{manifest.where}: engines[{index}]" for index in range(len(entries))]
    return [_Fields(_object(entry, where), where) for entry, where in zip(entries, wheres, strict=True)]


def _engine(fields: _Fields, files: dict[str, File]) -> EngineFile:
    engine = EngineFile(
        fields.get("file", str),
        fields.one_of("builder", tuple(MODULES)),
        fields.get("version", str),
        tuple(fields.sequence("compute_capabilities", 16)),
        fields.positive("capacity", MOST_TOKENS),
        fields.positive("max_batch", MOST_SLOTS),
        tuple(_profile(fields, index, entry) for index, entry in enumerate(fields.sequence("profiles", 16))),
        frozenset(str(name) for name in fields.sequence("aliased", MOST_STATES)),
    )
    if engine.file not in files:
        raise ArtifactError(f"{fields.where}: its file {_shown(engine.file)} is not among the manifest's files")
    targets = engine.compute_capabilities
    if not targets or not all(isinstance(name, str) and re.fullmatch(r"\d{1,3}\.\d", name) for name in targets):
        raise ArtifactError(f"{fields.where}: compute_capabilities are {_shown(targets)}; expected some like '8.9'")
    if not engine.profiles:
        raise ArtifactError(f"{fields.where}: has no profiles; build the engine again")
    return engine


def _profile(engine: _Fields, index: int, value: Any) -> Profile:
    where = f"{engine.where}: profiles[{index}]"
    fields = _Fields(_object(value, where), where)
    bounds = []
    for name in ("batch", "sequence"):
        sizes = fields.sequence(name, 3)
        if len(sizes) != 3 or not all(_is_size(size) for size in sizes) or sizes != sorted(sizes):
            raise ArtifactError(f"{where}: {name} is {_shown(sizes)}; expected three rising sizes")
        bounds.append(tuple(sizes))
    return Profile(fields.get("name", str), *bounds)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _files(manifest: _Fields) -> dict[str, File]:
    """The manifest's files by name, each name checked: a file of the directory itself."""
    entries = manifest.sub("files")
    if len(entries.values) > MOST_FILES:
        raise ArtifactError(f"{entries.where} has {len(entries.values)} entries; expected up to {MOST_FILES}")
    files = {}
    for name in entries.values:
        if not NAME.fullmatch(name):
            raise ArtifactError(
                f"{entries.where}: {_shown(name)} lies outside the artifact or is no plain name; "
                "expected a file of the directory itself"
            )
        entry = entries.sub(name)
        files[name] = File(entry.get("size", int), entry.get("sha256", str))
    return files


def _check_bounds(path: Path, graph: Graph, size: int) -> None:
    """No shape may be larger than weights of `size` bytes can mean.

    A token's row of a cache comes out of a projection, and a logit out of a row of the head, each of which has at
    least a byte in the files.
    """
    for state in graph.states:
        row = prod(dim for dim in state.shape if isinstance(dim, int))
        if row > size:
            raise ArtifactError(
                f"{path}: {_shown(state.input)} has rows of {row} numbers; {size} bytes of files have no such"
            )
    for name, count in (("vocabulary", graph.vocabulary), ("labels", graph.labels)):
        if count is not None and count > size:
            raise ArtifactError(f"{path}: {name} is {count}; {size} bytes of files have no such head")


def _check_graph(path: Path, data: bytes, graph: Graph, files: dict[str, File]) -> set[str]:
    """The ONNX file in `data` reads listed files within their sizes, and has the manifest's inputs and outputs.

    Returns the names of those files.
    """
    try:
        model = read_onnx(data)
    except OnnxFormatError as error:
        raise ArtifactError(f"{path}: {error}; export again") from error
    for domain, kind in sorted(model.operators):
        if domain not in DOMAINS:
            raise ArtifactError(
                f"{path}: its operator {_shown(kind)} is of domain {_shown(domain)}; expected ONNX's own"
            )
    for tensor in model.externals:
        file = files.get(tensor.location)
        if file is None:
            raise ArtifactError(
                f"{path}: its tensor {_shown(tensor.tensor)} lies in {_shown(tensor.location)}, "
                "which is not among the manifest's files"
            )
        if tensor.offset + tensor.length > file.size:
            raise ArtifactError(
                f"{path}: its tensor {_shown(tensor.tensor)} ends at byte {tensor.offset + tensor.length} of "
                f"{tensor.location}, which has {file.size}"
            )
    _check_values(path, graph, model)
    return {tensor.location for tensor in model.externals}


def _check_values(path: Path, graph: Graph, model: OnnxFile) -> None:
    integers, logits = ELEMENTS["int64"], ELEMENTS[graph.dtype]
    states = [
        (state, ELEMENTS[state.dtype], [d if isinstance(d, int) else None for d in state.shape])
        for state in graph.states
    ]
    inputs: list[tuple[str, int, list[int | None]]] = [
        (name, integers, [None] * (2 if name == "input_ids" else 1)) for name in graph.inputs
    ]
    inputs += [(state.input, element, shape) for state, element, shape in states]
    outputs: list[tuple[str, int, list[int | None]]] = [("logits", logits, [None, None, graph.logits_width])]
    outputs += [(state.output, element, shape) for state, element, shape in states]
    for expected, found, kind in ((inputs, model.inputs, "input"), (outputs, model.outputs, "output")):
        if len(expected) != len(found):
            raise ArtifactError(f"{path}: has {len(found)} {kind}s; the manifest says {len(expected)}; export again")
        for (name, element, shape), value in zip(expected, found, strict=True):
            if (name, element) != (value.name, value.element) or not _fits(shape, value):
                raise ArtifactError(
                    f"{path}: its {kind} {_shown(value.name)}, of element type {value.element} and shape "
                    f"{_shown(value.shape)}, is not the manifest's {_shown(name)}, {element}, {_shown(shape)}"
                )


def _fits(shape: list[int | None], value: Value) -> bool:
    """Whether the value has this shape, where both are known."""
    return len(shape) == len(value.shape) and all(
        expected is None or found is None or expected == found
        for expected, found in zip(shape, value.shape, strict=True)
    )


def _check_size(path: Path, file: File) -> None:
    size = _size(path, LARGEST_TEXT if path.suffix in (".json", ".onnx") else None)
    if size != file.size:
        raise ArtifactError(f"{path}: has {size} bytes; the manifest says {file.size}; export or copy it again")


def _checked_text(path: Path, file: File) -> bytes:
    """A JSON file's or graph's bytes, once their SHA-256 is the manifest's."""
    data = _read(path, file.size)
    _compare_hash(path, file, hashlib.sha256(data).hexdigest())
    return data


def _check_hash(path: Path, file: File) -> None:
    _compare_hash(path, file, file_hash(path))


def _compare_hash(path: Path, file: File, digest: str) -> None:
    if digest != file.sha256:
        raise ArtifactError(
            f"{path}: SHA-256 is {digest[:12]}…; the manifest says {_shown(file.sha256[:12])}…; export or copy it again"
        )


def _size(path: Path, most: int | None) -> int:
    """The size of a regular file; a link, a pipe or a device is none, wherever it leads."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing, though the manifest lists it; export again") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(
            f"{path}: is a link or a special file, so it may lie outside the artifact; copy the file itself"
        )
    if most is not None and status.st_size > most:
        raise ArtifactError(f"{path}: has {status.st_size} bytes; expected up to {most}")
    return status.st_size


def _read(path: Path, size: int) -> bytes:
    """`size` bytes of the file: no more, even if it has grown."""
    with path.open("rb") as stream:
        return stream.read(size)


def file_hash(path: Path) -> str:
    """A file's SHA-256, hexadecimal, without reading it into memory."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _parse(text: bytes, where: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: is no JSON: {error}") from error


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: is {type(value).__name__}; expected a JSON object")
    return value


def _shown(value: Any) -> str:
    """A value that may be anything, short enough for one line."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
