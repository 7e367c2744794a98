"""The artifact directory: written under a temporary name, and put in its place when it is whole and on the disk.

B batch, C cache capacity, V vocabulary.
"""

import ast
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.errors import ExportError
from export.quantization.graph import specialize
from export.rewrites.widen_bfloat16 import widen_bfloat16
from runtime.artifact.integrity import file_hash
from runtime.artifact.manifest import MANIFEST, SCHEMA, Window, input_names
from runtime.artifact.signature import SIGNATURE
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead

GRAPH, CPU_GRAPH, WEIGHTS = "model.onnx", "model.cpu.onnx", "model.onnx.data"
MODULE = "module"  # a node's metadata: which module of the model it comes from
VERIFICATION = "verification.json"
SMALLEST_CAPACITY = 64
PARTIAL = ".partial"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new directory that takes `out`'s place when the block ends, and vanishes when it raises.

    Raises `ExportError` where `out` holds something and `force` is not set; with `force` the old content stays
    until the new one is whole.
    """
    check_free(out, force)
    out = out.resolve()  # where it is a link, what it leads to is replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        new, lock = _locked(out)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; choose another --out") from error
    try:
        yield new
        for path in (*new.iterdir(), new):
            _sync(path)
        _place(new, out, force)
        _sync(out.parent)
    except OSError as error:
        if error.filename is None:  # as the libraries that write weights raise it
            error.filename = str(out)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)


def _locked(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and a lock on it that ends with this process, however that ends."""
    while True:
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
        lock = os.open(new, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if new.exists():  # no other export swept it away before it was locked
            new.chmod(0o755)
            return new, lock
        os.close(lock)


def _sweep(out: Path) -> None:
    """Remove what exports to `out` left that were killed: unfinished directories that nobody holds locked."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*{PARTIAL}"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # another process is writing it
        finally:
            os.close(lock)


def _place(new: Path, out: Path, force: bool) -> None:
    """Give `new` the name `out`. Raises `ExportError` where another export has filled that and `force` is not set."""
    try:
        os.rename(new, out)  # to a free name, or an empty directory's
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        check_free(out, force)
        _exchange(new, out)


def _exchange(new: Path, out: Path) -> None:
    """Swap two directories in one step, so that whoever looks finds the old one whole or the new one."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None:
        if swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE) == 0:
            return
        if (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(out))
    # A file system that cannot swap: two steps, and back where the second fails.
    old = new.with_suffix(".old" + PARTIAL)
    os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have a file or directory on the disk before what refers to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(out: Path, force: bool) -> None:
    """Raise `ExportError` unless an artifact may be written at `out`."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: is a file; expected a new or empty directory for --out")
    if out.exists() and any(out.iterdir()) and not force:
        raise ExportError(f"{out}: exists and is not empty; choose another --out, or --force to replace it")


def capacities(max_length: int) -> list[int]:
    """The capacity buckets: from 64 on by 64, or by an eighth of the power of two below, up to `max_length`.

    Attention reads a cache to its end, so steps are small; but each growth moves what is there.
    """
    sizes = [SMALLEST_CAPACITY]
    while sizes[-1] < max_length:
        below = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(SMALLEST_CAPACITY, below // 8))
    return [*(size for size in sizes if size < max_length), max_length]


def save_graph(graph: ir.Model, directory: Path, dtype: str, quantization: str = "none") -> None:
    """Write the graph and, beside it in one file, its weights, each once.

    What the exporter notes of its own is left out: the places in the sources, with the paths of this machine. Of a
    node only its module in the model stays, so that whoever refuses the node can say where it comes from.
    """
    graph.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.graph:
        module = _module_path(node)
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE] = module
        for value in node.outputs:
            value.metadata_props.clear()
    ir.save(graph, directory / GRAPH, external_data=WEIGHTS, size_threshold_bytes=1024)
    if dtype == "bfloat16":  # ONNX Runtime's CPU kernels know no bfloat16: a second graph over the same weights
        ir.save(widen_bfloat16(ir.load(directory / GRAPH)), directory / CPU_GRAPH)
    elif quantization != "none":
        ir.save(specialize(ir.load(directory / GRAPH)), directory / CPU_GRAPH)


def _module_path(node: ir.Node) -> str:
    """The path in the model of the module that a node comes from, as the exporter noted it, or ""."""
    scopes = [
        scope for scope in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))[:-1] if scope
    ]
    return scopes[-1].removeprefix("model.") if scopes else ""  # the step graph calls the whole model `model`


def describe(
    graph: ir.Model, config: dict[str, Any], parameters: int, *, dtype: str, logits: str, max_batch: int,
    max_length: int, quantization: str = "none", window: Window | None = None, labels: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest but for its file list and its verdict."""
    states = [
        {
            "input": value.name,
            "output": f"{value.name}.out",
            "shape": [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()],
            "dtype": str((value.dtype or ir.DataType.UNDEFINED).numpy()),
        }
        for value in graph.graph.inputs
        if value.name not in input_names(window)
    ]
    packages = ("wm-models", "torch", "transformers", "onnx", "onnxscript", *packages_distributions()["onnxruntime"])
    return {
        "schema": SCHEMA,
        "producer": {name: version(name) for name in packages},
        "model": {"type": config["model_type"], "config": config, "parameters": parameters},
        "graph": {
            "file": GRAPH,
            "cpu_file": GRAPH if dtype != "bfloat16" and quantization == "none" else CPU_GRAPH,
            "opset": graph.opset_imports[""],
            "dtype": dtype,
            "quantization": quantization,
            "logits": logits,
            "vocabulary": config["vocab_size"],
            "max_batch": max_batch,
            "max_length": max_length,
            "capacities": capacities(max_length),
            "states": states,
            **({"window": asdict(window)} if window else {}),
            **({"labels": labels} if labels else {}),
        },
    }


def parameter_count(model: DecoderWithHead) -> int:
    """Distinct parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def label_count(model: DecoderWithHead) -> int | None:
    """The labels that a classifier chooses from; None of a language model."""
    return None if isinstance(model, DecoderForCausalLM) else model.head.out_features


def write_manifest(directory: Path, manifest: dict[str, Any], verified: bool) -> None:
    """List every file with its size and SHA-256, and give the verdict."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(directory.iterdir())
        if path.name not in (MANIFEST, SIGNATURE)
    }
    write_json(directory / MANIFEST, {**manifest, "files": files, "verified": verified})


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what was there stays, under its other names for good."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)
