"""What is in an artifact, for a person to read."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.targets.base import Table
from export.targets.registry import TARGETS
from runtime import ArtifactError
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, parse_manifest
from runtime.text.labels import label_names


@dataclass(frozen=True)
class Inspection:
    """A summary line, and tables."""

    summary: str
    tables: list[Table]


def inspect_artifact(directory: str | Path) -> Inspection:
    """Inputs, outputs, operator counts and file sizes. Raises `runtime.ArtifactError`."""
    artifact = read_artifact(Path(directory), allow_unverified=True)
    graph = ir.load(artifact.path / artifact.graph.file).graph
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    values = [("input", value) for value in graph.inputs] + [("output", value) for value in graph.outputs]
    summary = (
        f"{artifact.path}: {artifact.model_type}, {artifact.parameters:,} parameters, {artifact.graph.dtype}, "
        f"{artifact.graph.cache_dtype} caches, "
        f"up to {artifact.graph.max_length} tokens in each of {artifact.graph.max_batch} slots, "
        f"{'verified' if artifact.verified else 'NOT VERIFIED'}"
    )
    try:
        manifest = parse_manifest(artifact.manifest, artifact.path / MANIFEST)
        own = [table for target in TARGETS.values() for table in target.tables(manifest)]
    except (LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: a target's section is damaged ({error}); export again") from error
    names = label_names(artifact)
    labels = [Table("Labels", ["", "label"], [[str(index), name] for index, name in enumerate(names)])] if names else []
    shapes = [[kind, value.name or "", str(value.shape), str(value.dtype)] for kind, value in values]
    counts = [[name, str(count)] for name, count in operators.most_common()]
    files = [[name, f"{entry.size:,}", entry.sha256[:16]] for name, entry in artifact.files.items()]
    return Inspection(
        summary,
        [
            Table("Inputs and outputs", ["", "name", "shape", "dtype"], shapes),
            Table("Operators", ["operator", "count"], counts),
            *own,
            *labels,
            Table("Files", ["file", "bytes", "SHA-256"], files),
        ],
    )
