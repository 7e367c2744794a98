"""What manifest.json says: the model, the contract of its graph, and every file with its size and SHA-256.

B batch (slots), C cache capacity, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from export.package.directory import write_file
from runtime.artifact.integrity import file_hash
from runtime.artifact.manifest import MANIFEST, File, Graph, Manifest, Model, State, manifest_json
from runtime.artifact.signature import SIGNATURE
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead

SMALLEST_CAPACITY = 64


def describe(graph: ir.Model, config: dict[str, Any], parameters: int, contract: Graph) -> Manifest:
    """The manifest of a lowered graph, but for its file list and its verdict.

    `contract`: what the graph promises, but for its states and its opset, which are taken from the graph itself.
    """
    states = tuple(
        State(
            input=value.name or "",
            output=f"{value.name}.out",
            shape=tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),  # type: ignore[arg-type]
            dtype=str((value.dtype or ir.DataType.UNDEFINED).numpy()),
        )
        for value in graph.graph.inputs
        if value.name not in contract.inputs
    )
    return Manifest(
        model=Model(config["model_type"], parameters, config),
        graph=replace(contract, states=states, opset=graph.opset_imports[""]),
        files={},
        verified=False,
        producer=dict(_producer()),
    )


@cache
def _producer() -> Mapping[str, str]:
    """The packages that make a graph or run it, and their versions."""
    packages = ("wm-models", "torch", "transformers", "onnx", "onnxscript", *packages_distributions()["onnxruntime"])
    return MappingProxyType({name: version(name) for name in packages})


def capacities(max_length: int) -> list[int]:
    """The capacity buckets: from 64 on by 64, or by an eighth of the power of two below, up to `max_length`.

    Attention reads a cache to its end, so steps are small; but each growth moves what is there.
    """
    sizes = [SMALLEST_CAPACITY]
    while sizes[-1] < max_length:
        below = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(SMALLEST_CAPACITY, below // 8))
    return [*(size for size in sizes if size < max_length), max_length]


def parameter_count(model: DecoderWithHead) -> int:
    """Distinct parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def label_count(model: DecoderWithHead) -> int | None:
    """The labels that a classifier chooses from; None of a language model."""
    return None if isinstance(model, DecoderForCausalLM) else model.head.out_features


def write_manifest(
    directory: Path,
    manifest: Manifest,
    verified: bool,
    names: Iterable[str] | None = None,
    known: Mapping[str, File] = MappingProxyType({}),
) -> Mapping[str, File]:
    """List the files of the directory, or those of these `names`, with size and SHA-256, and give the verdict.

    `known`: the entries of files that are not to be hashed again. Returns all entries.
    """
    if names is None:
        names = sorted(path.name for path in directory.iterdir())
    files = {
        name: known.get(name) or File((directory / name).stat().st_size, file_hash(directory / name))
        for name in names
        if name not in (MANIFEST, SIGNATURE)
    }
    write_file(directory / MANIFEST, manifest_json(replace(manifest, files=files, verified=verified)))
    return files
