"""Open an artifact directory, and believe nothing in it that was not checked.

What is read lies in the directory itself and has the size and the SHA-256 that the manifest gives. A graph is checked
too, for what it would make ONNX Runtime read and allocate.

B batch (slots), C cache capacity, V vocabulary.
"""

import hashlib
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from os import PathLike
from pathlib import Path

from runtime.artifact.manifest import ELEMENTS, MANIFEST, Artifact, File, Graph, parse_manifest, shown
from runtime.artifact.onnx_reader import OnnxFile, OnnxFormatError, Value, read_onnx
from runtime.artifact.signature import check_signature
from runtime.errors import ArtifactError

DOMAINS = ("", "com.microsoft")  # ONNX's own operators, and ONNX Runtime's
LARGEST_MANIFEST, LARGEST_TEXT = 4 << 20, 64 << 20  # bytes; texts are what is read whole: JSON files and graphs


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
    manifest = parse_manifest(text, path)
    graph, files = manifest.graph, manifest.files
    for name in (graph.file, graph.cpu_file):
        if name not in files:
            raise ArtifactError(f"{path}: its graph {shown(name)} is not among its files")
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
    if not (manifest.verified or allow_unverified):
        raise ArtifactError(
            f"{directory}: failed or lacks its verification; repeat it with wm-export verify, "
            "or load it with allow_unverified=True"
        )
    model = manifest.model
    return Artifact(
        directory, text, model.type, model.parameters, graph, manifest.sections, files, texts, manifest.verified
    ), sorted(weights)


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
                    f"{path}: its {kind} {shown(value.name)}, of element type {value.element} and shape "
                    f"{shown(value.shape)}, is not the manifest's {shown(name)}, {element}, {shown(shape)}"
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
            f"{path}: SHA-256 is {digest[:12]}…; the manifest says {shown(file.sha256[:12])}…; export or copy it again"
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
