"""manifest.json: its one schema, which both reads and writes it, and the artifact that it describes.

The dataclasses here are the schema: `parse_manifest` checks every type and bound while it converts, and `manifest_json`
writes what it would accept. A top-level section that is not named here belongs to a target or backend; it is kept as
it is, and whoever owns it reads it with `Artifact.section` through a dataclass of its own.

B batch (slots), S new tokens, R rows of logits, C cache capacity, V vocabulary.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from runtime.artifact.folder import Folder
from runtime.artifact.onnx_reader import read_onnx, relocated
from runtime.errors import ArtifactError

SCHEMA = 2  # 1 has no graphs with `LOGITS_INDEX`
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
INPUTS = ("input_ids", "cache_lengths", "sequence_lengths")
EVICTED = "dropped_lengths"  # the input that a graph with a window has besides: tokens whose rows were evicted
LOGITS_INDEX = "logits_index"  # the input of an indexed graph, (B, R): which of the S new tokens get logits
NEXT_IDS = "next_ids"  # an engine's output beside the graph's own: the argmax of each row of logits
DTYPES = ("float32", "float16", "bfloat16")
STATE_DTYPES = (*DTYPES, "int8")
LOGITS = ("last", "all")
ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int8": 3}  # onnx.TensorProto's numbers

# Far beyond any model, and small enough that reading up to them harms no machine.
MOST_FILES, MOST_STATES, MOST_CAPACITIES = 256, 1 << 14, 256
MOST_SLOTS, MOST_TOKENS, MOST_LABELS = 1 << 16, 1 << 26, 1 << 20
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

T = TypeVar("T")
Size = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
PlainName = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]


@dataclass(frozen=True)
class State:
    """One cache: its names in the graph, and its shape, in which "batch" and "capacity" stand for B and C.

    `dtype`: the graph's, float32 of a recurrence's state, or int8 of keys and values, whose scales are the graph's own.
    """

    input: str
    output: str
    shape: Annotated[tuple[Size | Literal["batch", "capacity"], ...], Meta(max_length=8)]
    dtype: str

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, STATE_DTYPES)

    def sized(self, batch: int, capacity: int) -> tuple[int, ...]:
        names = {"batch": batch, "capacity": capacity}
        return tuple(names[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class Window:
    """A cache has `rows` rows at most: the `keep` keys of largest bias, and those that came since they were chosen."""

    keep: int
    rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.rows:
            raise ValueError(f"keep is {shown(self.keep)}; expected 1 to {shown(self.rows - 1)}, less than rows")


def input_names(evicts: bool, indexed: bool) -> tuple[str, ...]:
    """The graph's inputs but for its states; all are int64: the first (B, S), `LOGITS_INDEX` (B, R), the others (B)."""
    return (*INPUTS, *((EVICTED,) if evicts else ()), *((LOGITS_INDEX,) if indexed else ()))


@dataclass(frozen=True)
class Graph:
    """What a step graph takes, gives and allows.

    `file`: the portable ONNX graph. `cpu_file`: the graph that runs on a CPU: `file`, or one with operators that suit
    a CPU better. `dtype`: of logits, of weights without a `quantization`, whose name is the exporter's, "none" for
    none, and of caches whose state names no other. `logits`: "last", of each slot's last real token, or "all".
    `indexed`: of "last", whether its input `logits_index` names the tokens instead; else a step gives one row of
    logits a slot. `vocabulary`: V. `max_batch`: the most slots. `max_length`: the most tokens of a slot. `capacities`:
    the values of C, rising, the last of them `max_length`. `states`: the caches. `window`: of a graph that evicts rows.
    `labels`: how many a classifier has. `opset`: the version of ONNX's operators. Raises ValueError for values that
    contradict each other.
    """

    file: str
    cpu_file: str
    dtype: str
    quantization: PlainName
    logits: str
    vocabulary: Annotated[int, Meta(ge=1, le=1 << 31)]
    max_batch: Annotated[int, Meta(ge=1, le=MOST_SLOTS)]
    max_length: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    capacities: Annotated[tuple[Size, ...], Meta(max_length=MOST_CAPACITIES)]
    states: Annotated[tuple[State, ...], Meta(max_length=MOST_STATES)]
    window: Window | None = None
    labels: Annotated[int, Meta(ge=1, le=MOST_LABELS)] | None = None
    opset: int | None = None
    indexed: bool = False

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("logits", self.logits, LOGITS)
        if self.indexed and self.logits != "last":
            raise ValueError(f"indexed is true and logits {shown(self.logits)}; expected last")
        rising = list(self.capacities) == sorted(set(self.capacities))
        if not self.capacities or not rising or self.capacities[-1] != self.max_length:
            raise ValueError(
                f"capacities are {shown(self.capacities)}; expected rising sizes up to {shown(self.max_length)}"
            )
        if self.window is not None:
            self._check_window(self.window)

    def _check_window(self, window: Window) -> None:
        """Every layer with a cache of C rows must have a key, a value and a bias cache."""
        if window.rows > self.max_length:
            raise ValueError(f"window.rows is {shown(window.rows)}; expected 1 to {self.max_length}")
        shapes = {state.input: state.shape for state in self.states if "capacity" in state.shape}
        for layer in {name.rpartition(".")[0] for name in shapes}:
            found = [shapes.get(f"{layer}.{part}", ()) for part in ("key", "value", "bias")]
            if any(len(s) != 4 or s[:3] != ("batch", found[0][1], "capacity") for s in found):
                raise ValueError(f"window: the caches of {shown(layer)} are no key, value and bias of its heads")

    @property
    def logits_width(self) -> int:
        """The logits of a token: one for each id of the vocabulary, or for each label."""
        return self.vocabulary if self.labels is None else self.labels

    @property
    def cache_dtype(self) -> str:
        """Of keys and values: "int8", or `dtype`."""
        return "int8" if any(state.dtype == "int8" for state in self.states) else self.dtype

    @property
    def inputs(self) -> tuple[str, ...]:
        return input_names(self.window is not None, self.indexed)

    @property
    def chunk(self) -> int:
        """The most tokens of a slot in one step."""
        return self.max_length if self.window is None else self.window.rows - self.window.keep

    @property
    def most_rows(self) -> int:
        """The most tokens of a slot that one step gives logits of; of a classifier, the last alone is asked for."""
        return self.chunk if self.logits == "all" or (self.indexed and self.labels is None) else 1

    def rows(self, capacity: int) -> int:
        """The rows that the caches of a slot of `capacity` tokens have."""
        return capacity if self.window is None else min(capacity, self.window.rows)


@dataclass(frozen=True)
class File:
    """A file of the artifact's directory: its size in bytes and its SHA-256, hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """What was exported: config.json's `model_type`, the number of parameters, and the configuration."""

    type: str
    parameters: int
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json. `files`: every other file by name. `verified`: whether the graph passed its comparisons.

    `producer`: versions of the packages that wrote it. `sections`: other top-level sections, each its owner's.
    """

    model: Model
    graph: Graph
    files: dict[str, File]
    verified: bool
    producer: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: every listed file has the size and the hash that the manifest gives.

    `manifest`: the bytes of manifest.json. `texts`: those of the texts beside it, `graphs`: those of the graphs, as
    they were when they were checked. `sections`: what targets and backends have in the manifest, by name. `folder`: the
    opened directory, from which all else is read.
    """

    path: Path
    manifest: bytes
    model_type: str
    parameters: int
    graph: Graph
    sections: dict[str, Any]
    files: dict[str, File]
    texts: dict[str, bytes]
    verified: bool
    folder: Folder = field(repr=False)
    graphs: dict[str, bytes] = field(repr=False)

    def model(self, name: str) -> bytes:
        """A graph for ONNX Runtime, which finds its weights, below the folder "/", in the files that were opened.

        `name`: of a listed graph or, of one that was put beside it later, its file.
        """
        if name not in self.files:
            self.folder.forget([name])
        data = self.graphs[name] if name in self.files else self.folder.read(name)
        return relocated(data, lambda location: self.folder.link(location).lstrip("/"))

    def weights(self, name: str) -> set[str]:
        """The files that the weights of a listed graph lie in."""
        return {tensor.location for tensor in read_onnx(self.graphs[name]).externals}

    def copy_file(self, name: str, path: Path) -> None:
        """Write the bytes of a listed file, as they were checked, to a new file."""
        held = self.texts.get(name, self.graphs.get(name))
        if held is None:
            shutil.copyfile(self.folder.link(name), path)
        else:
            path.write_bytes(held)

    def read_json(self, name: str) -> dict[str, Any]:
        """A listed JSON file's object; empty where the artifact has no such file."""
        if name not in self.texts:
            return {}
        return as_object(parse_json(self.texts[name], self.path / name), self.path / name)

    def section(self, name: str, kind: type[T]) -> T | None:
        """The manifest's section `name` as a `kind`, or None where there is none. Raises `ArtifactError`."""
        if name not in self.sections:
            return None
        return convert(self.sections[name], kind, f"{self.path / MANIFEST}: {name}")


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest in `text`; `path` is for messages. Raises `ArtifactError`, which says what and where."""
    values = as_object(parse_json(text, path, unique=True), path)
    schema = convert(_required(values, "schema", path), int, f"{path}: schema")
    if schema > SCHEMA:
        raise ArtifactError(f"{path}: has schema {schema}; this runtime reads up to {SCHEMA}, so upgrade wm-models")
    if schema < 1:
        raise ArtifactError(f"{path}: has schema {shown(schema)}; expected 1 to {SCHEMA}; export again")
    for name in ("window", "labels"):
        graph = values.get("graph")
        if isinstance(graph, dict) and graph.get(name, 0) is None:
            raise ArtifactError(f"{path}: graph.{name} is null; expected a value, or no {name} at all")
    known = {name: convert(_required(values, name, path), kind, f"{path}: {name}") for name, kind in PARTS.items()}
    own = {name: value for name, value in values.items() if name not in (*PARTS, "files", "producer", "schema")}
    producer = convert(values.get("producer", {}), dict[str, Any], f"{path}: producer")
    return Manifest(**known, files=_files(values, path), producer=producer, sections=own, schema=schema)


PARTS: dict[str, Any] = {"model": Model, "graph": Graph, "verified": bool}


def manifest_json(manifest: Manifest) -> bytes:
    """The text of manifest.json. Raises `ArtifactError` where `parse_manifest` would refuse it."""
    values = asdict(manifest)
    graph = {name: value for name, value in values["graph"].items() if value is not None and value is not False}
    values |= {"graph": graph, **values.pop("sections")}
    order = ("schema", "producer", "model", "graph", *manifest.sections, "files", "verified")
    text = (json.dumps({name: values[name] for name in order}, indent=2) + "\n").encode()
    parse_manifest(text, Path(MANIFEST))
    return text


def _files(values: dict[str, Any], path: Path) -> dict[str, File]:
    """The manifest's files by name, each name checked: a file of the directory itself."""
    entries = convert(_required(values, "files", path), dict[str, Any], f"{path}: files")
    if len(entries) > MOST_FILES:
        raise ArtifactError(f"{path}: files has {len(entries)} entries; expected up to {MOST_FILES}")
    for name in entries:
        if not NAME.fullmatch(name):
            raise ArtifactError(
                f"{path}: files: {shown(name)} lies outside the artifact or is no plain name; "
                "expected a file of the directory itself"
            )
    return {name: convert(entry, File, f"{path}: files.{name}") for name, entry in entries.items()}


def _required(values: dict[str, Any], name: str, path: Path) -> Any:
    if name not in values:
        raise ArtifactError(f"{path}: {name} is missing; export again")
    return values[name]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")


def parse_json(text: bytes, where: Path, unique: bool = False) -> Any:
    """The JSON value in `text`; with `unique` a key given twice is refused. Raises `ArtifactError`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: is no JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return values


def as_object(value: Any, where: object) -> dict[str, Any]:
    """A JSON object. Raises `ArtifactError` for any other value."""
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: is {type(value).__name__}; expected a JSON object")
    return value


def convert(value: Any, kind: type[T], where: str) -> T:
    """A parsed JSON value as `kind`, a dataclass or another type, with its types and bounds checked.

    Raises `ArtifactError` with `where` it is, the field, what it is and what was expected. No value is coerced.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{where}{_complaint(str(error), value)}; export again") from error
    except UnicodeEncodeError as error:
        raise ArtifactError(f"{where}: holds a text that is not Unicode; export again") from error


def _complaint(message: str, value: Any) -> str:
    """msgspec's message about `value`, such as "Expected `int`, got `str` - at `$.states[0].dtype`", as ours."""
    reason, _, place = message.rpartition(" - at `$") if " - at `$" in message else (message, "", "")
    place = place.rstrip("`")
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", place):
        value = value[int(index) if index else name]
    reason = reason.replace("`", "")
    if missing := re.fullmatch(r"Object missing required field (.*)", reason):
        return f"{place}.{missing[1]} is missing"
    if wrong := re.fullmatch(r"Expected (.*), got (.*)", reason):
        return f"{place} is {wrong[2]}; expected {wrong[1]}"
    if reason.startswith("Invalid "):  # "Invalid enum value" and the value, which may be long
        return f"{place} is {shown(value)}, which is none of its values"
    if not reason.startswith("Expected "):
        return f"{place}: {reason[:200]}"
    found = f"has {len(value)} entries" if isinstance(value, list) else f"is {shown(value)}"
    return f"{place} {found}; e{reason[1:]}"


def shown(value: Any) -> str:
    """A value that may be anything, short enough for one line."""
    return _SHORT.repr(value)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
