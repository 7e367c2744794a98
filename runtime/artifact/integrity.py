"""Open an artifact directory, and believe nothing in it that was not checked.

What is read lies in the directory itself and has the size and the SHA-256 that the manifest gives. A graph is checked
too, for what it would make ONNX Runtime read and allocate.

B batch (slots), C cache capacity, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from os import PathLike
from pathlib import Path

from runtime.artifact.folder import Folder
from runtime.artifact.manifest import (
    ELEMENTS,
    LOGITS_INDEX,
    MANIFEST,
    TOKENIZER,
    Artifact,
    File,
    Graph,
    parse_manifest,
    shown,
)
from runtime.artifact.onnx_reader import OnnxFile, OnnxFormatError, Value, read_onnx
from runtime.artifact.signature import check_signature
from runtime.errors import ArtifactError
from runtime.host.budget import Budget

DOMAINS = ("", "com.microsoft")  # ONNX's own operators, and ONNX Runtime's
# Bytes of what is read whole. Python's objects of a JSON text take twenty times its size, a tokenizer's own fewer.
LARGEST_MANIFEST, LARGEST_GRAPH, LARGEST_TEXT, LARGEST_TEXTS = 4 << 20, 16 << 20, 64 << 20, 96 << 20


def read_artifact(
    directory: Path,
    allow_unverified: bool = False,
    public_key: str | PathLike[str] | bytes | None = None,
    budget: Budget | None = None,
) -> Artifact:
    """The artifact in `directory`; with `public_key` (a PEM file, or its bytes) only if its holder signed it.

    Raises `ArtifactError`.
    """
    with open_artifact(directory, allow_unverified, public_key, budget) as artifact:
        return artifact


@contextmanager
def open_artifact(
    directory: Path,
    allow_unverified: bool = False,
    public_key: str | PathLike[str] | bytes | None = None,
    budget: Budget | None = None,
) -> Iterator[Artifact]:
    """As `read_artifact`, but the graphs' weights are hashed while the block runs, which takes half as long as loading.

    All else, their sizes too, is checked before the block, and they by its end: what was made of them is to be used
    after it. With a key their hashes are checked before it too, so nothing computes with bytes that nobody signed.
    Every file is opened once, and the artifact reads from what was opened.
    """
    budget = Budget() if budget is None else budget
    artifact, weights = _read_all_but_weights(Folder(directory), allow_unverified, public_key, budget)
    pool = ThreadPoolExecutor(1)

    def check_rest() -> None:
        _raise_first(hashes)
        artifact.folder.check_unchanged()

    try:
        hashes = [pool.submit(_check_hash, artifact.folder, name, artifact.files[name], budget) for name in weights]
        if public_key is not None:
            _raise_first(hashes)
        try:
            yield artifact
        except Exception:
            check_rest()  # a wrong hash explains whatever else went wrong
            raise
        check_rest()
    except BaseException:
        budget.stop()
        raise
    finally:
        pool.shutdown()
    artifact.folder.forget(artifact.texts)


def _raise_first(checks: list[Future[None]]) -> None:
    for check in checks:
        check.result()


def _read_all_but_weights(
    folder: Folder, allow_unverified: bool, public_key: str | PathLike[str] | bytes | None, budget: Budget
) -> tuple[Artifact, list[str]]:
    """The artifact, and the files of its weights, of which only the sizes are checked."""
    directory, path = folder.path, folder.path / MANIFEST
    if not folder.has(MANIFEST):
        raise ArtifactError(f"{directory}: has no {MANIFEST}, so it is no artifact, or its export did not finish")
    _check_limit(folder, MANIFEST, LARGEST_MANIFEST)
    text = folder.read(MANIFEST)
    if public_key is not None:
        check_signature(folder, text, public_key)
    manifest = parse_manifest(text, path)
    graph, files = manifest.graph, manifest.files
    for name in (graph.file, graph.cpu_file):
        if name not in files:
            raise ArtifactError(f"{path}: its graph {shown(name)} is not among its files")
    _check_bounds(path, graph, sum(file.size for file in files.values()))
    for name, file in files.items():
        _check_size(folder, name, file)
    read = [name for name in files if _is_read(name, files[name])]
    if (size := sum(files[name].size for name in read)) > LARGEST_TEXTS:
        raise ArtifactError(f"{directory}: its texts have {size} bytes; expected up to {LARGEST_TEXTS}")
    graphs = {name: _checked_text(folder, name, files[name]) for name in {graph.file, graph.cpu_file}}
    weights = {name: _check_graph(directory / name, data, graph, files) for name, data in graphs.items()}
    budget.check_bytes(sum(files[name].size for name in weights[graph.cpu_file]), f"{directory}: its weights")
    texts = {}
    hashed = set().union(*weights.values())
    for name, file in files.items():
        if name in read:
            texts[name] = _checked_text(folder, name, file)
        elif name not in hashed and name not in graphs:
            _check_hash(folder, name, file, budget)
    if not (manifest.verified or allow_unverified):
        raise ArtifactError(
            f"{directory}: failed or lacks its verification; repeat it with wm-export verify, "
            "or load it with allow_unverified=True"
        )
    model = manifest.model
    artifact = Artifact(
        directory, text, model.type, model.parameters, graph, manifest.sections, files, texts, manifest.verified,
        folder, graphs,
    )  # fmt: skip
    return artifact, sorted(hashed)


def _is_read(name: str, file: File) -> bool:
    """Whether a file is a text that is held: the tokenizer, and those of a size that a configuration has."""
    return name == TOKENIZER or (name.endswith((".json", ".jinja")) and file.size <= LARGEST_MANIFEST)


def _check_bounds(path: Path, graph: Graph, size: int) -> None:
    """No shape may be larger than weights of `size` bytes can mean.

    A token's row of a cache comes out of a projection, and a logit out of a row of the head, each of which has at
    least a byte in the files.
    """
    for state in graph.states:
        row = prod(dim for dim in state.shape if isinstance(dim, int))
        if row > size:
            raise ArtifactError(
                f"{path}: {shown(state.input)} has rows of {row} numbers; {size} bytes of files have no such"
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
            raise ArtifactError(f"{path}: its operator {shown(kind)} is of domain {shown(domain)}; expected ONNX's own")
    for tensor in model.externals:
        file = files.get(tensor.location)
        if file is None:
            raise ArtifactError(
                f"{path}: its tensor {shown(tensor.tensor)} lies in {shown(tensor.location)}, "
                "which is not among the manifest's files"
            )
        if tensor.offset + tensor.length > file.size:
            raise ArtifactError(
                f"{path}: its tensor {shown(tensor.tensor)} ends at byte {tensor.offset + tensor.length} of "
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
        (name, integers, [None] * (2 if name in ("input_ids", LOGITS_INDEX) else 1)) for name in graph.inputs
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
                    f"{path}: its {kind} {shown(value.name)}, of element type {value.element} and shape "
                    f"{shown(value.shape)}, is not the manifest's {shown(name)}, {element}, {shown(shape)}"
                )


def _fits(shape: list[int | None], value: Value) -> bool:
    """Whether the value has this shape, where both are known."""
    return len(shape) == len(value.shape) and all(
        expected is None or found is None or expected == found
        for expected, found in zip(shape, value.shape, strict=True)
    )


def _check_size(folder: Folder, name: str, file: File) -> None:
    limit = {".json": LARGEST_TEXT, ".onnx": LARGEST_GRAPH, ".jinja": LARGEST_MANIFEST}.get(Path(name).suffix)
    size = folder.size(name) if limit is None else _check_limit(folder, name, limit)
    if size != file.size:
        raise ArtifactError(
            f"{folder.path / name}: has {size} bytes; the manifest says {file.size}; export or copy it again"
        )


def _check_limit(folder: Folder, name: str, most: int) -> int:
    """A file's size, which is at most `most` bytes."""
    size = folder.size(name)
    if size > most:
        raise ArtifactError(f"{folder.path / name}: has {size} bytes; expected up to {most}")
    return size


def _checked_text(folder: Folder, name: str, file: File) -> bytes:
    """A JSON file's or graph's bytes, once their SHA-256 is the manifest's."""
    data = folder.read(name)
    _compare_hash(folder.path / name, file, hashlib.sha256(data).hexdigest())
    return data


def _check_hash(folder: Folder, name: str, file: File, budget: Budget) -> None:
    _compare_hash(folder.path / name, file, folder.sha256(name, budget.check))


def _compare_hash(path: Path, file: File, digest: str) -> None:
    if digest != file.sha256:
        raise ArtifactError(
            f"{path}: SHA-256 is {digest[:12]}…; the manifest says {shown(file.sha256[:12])}…; export or copy it again"
        )


def file_hash(path: Path) -> str:
    """A file's SHA-256, hexadecimal, without reading it into memory."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
