"""The artifact directory: written under a temporary name, renamed when whole.

B batch, C cache capacity, V vocabulary.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from runtime.artifact import INPUTS, SCHEMA, file_hash
from wm_models.decoder import DecoderForCausalLM

from .errors import ExportError
from .graph import widen

GRAPH, CPU_GRAPH, WEIGHTS = "model.onnx", "model.cpu.onnx", "model.onnx.data"
MANIFEST, VERIFICATION = "manifest.json", "verification.json"
SMALLEST_CAPACITY = 256


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new directory that takes `out`'s place when the block ends, and vanishes when it raises.

    Raises `ExportError` where `out` holds something and `force` is not set; with `force` the old content stays
    until the new one is whole.
    """
    check_free(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; choose another --out") from error
    new.chmod(0o755)
    try:
        yield new
        old = new.with_suffix(".old")
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.filename is None:  # as the libraries that write weights raise it
            error.filename = str(out)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_free(out: Path, force: bool) -> None:
    """Raise `ExportError` unless an artifact may be written at `out`."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: is a file; expected a new or empty directory for --out")
    if out.exists() and any(out.iterdir()) and not force:
        raise ExportError(f"{out}: exists and is not empty; choose another --out, or --force to replace it")


def capacities(max_length: int) -> list[int]:
    """The capacity buckets: 256, doubled until `max_length`, which is the last."""
    sizes = [SMALLEST_CAPACITY]
    while sizes[-1] < max_length:
        sizes.append(sizes[-1] * 2)
    return [*(size for size in sizes if size < max_length), max_length]


def save_graph(graph: ir.Model, directory: Path, dtype: str) -> None:
    """Write the graph and, beside it in one file, its weights, each once."""
    ir.save(graph, directory / GRAPH, external_data=WEIGHTS, size_threshold_bytes=1024)
    if dtype == "bfloat16":  # ONNX Runtime's CPU kernels know no bfloat16: a second graph over the same weights
        ir.save(widen(ir.load(directory / GRAPH)), directory / CPU_GRAPH)


def describe(
    graph: ir.Model, config: dict[str, Any], parameters: int, *, dtype: str, logits: str, max_batch: int,
    max_length: int,
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
        if value.name not in INPUTS
    ]
    packages = ("wm-models", "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu")
    return {
        "schema": SCHEMA,
        "producer": {name: version(name) for name in packages},
        "model": {"type": config["model_type"], "config": config, "parameters": parameters},
        "graph": {
            "file": GRAPH,
            "cpu_file": CPU_GRAPH if dtype == "bfloat16" else GRAPH,
            "opset": graph.opset_imports[""],
            "dtype": dtype,
            "logits": logits,
            "vocabulary": config["vocab_size"],
            "max_batch": max_batch,
            "max_length": max_length,
            "capacities": capacities(max_length),
            "states": states,
        },
    }


def parameter_count(model: DecoderForCausalLM) -> int:
    """Distinct parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_manifest(directory: Path, manifest: dict[str, Any], verified: bool) -> None:
    """List every file with its size and SHA-256, and write the manifest at once: an artifact has one or has none."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }
    text = json.dumps({**manifest, "files": files, "verified": verified}, indent=2) + "\n"
    unfinished = directory / f".{MANIFEST}"
    unfinished.write_text(text)
    os.replace(unfinished, directory / MANIFEST)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
