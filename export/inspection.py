"""What is in an artifact, for a person to read."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from runtime.artifact import read_artifact


@dataclass(frozen=True)
class Inspection:
    """A summary line, and tables of (title, columns, rows)."""

    summary: str
    tables: list[tuple[str, list[str], list[list[str]]]]


def inspect_artifact(directory: str | Path) -> Inspection:
    """Inputs, outputs, operator counts and file sizes. Raises `runtime.ArtifactError`."""
    artifact = read_artifact(Path(directory), allow_unverified=True)
    graph = ir.load(artifact.path / artifact.graph.file).graph
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    values = [("input", value) for value in graph.inputs] + [("output", value) for value in graph.outputs]
    summary = (
        f"{artifact.path}: {artifact.model_type}, {artifact.parameters:,} parameters, {artifact.graph.dtype}, "
        f"up to {artifact.graph.max_length} tokens in each of {artifact.graph.max_batch} slots, "
        f"{'verified' if artifact.verified else 'NOT VERIFIED'}"
    )
    return Inspection(
        summary,
        [
            (
                "Inputs and outputs",
                ["", "name", "shape", "dtype"],
                [[kind, value.name or "", str(value.shape), str(value.dtype)] for kind, value in values],
            ),
            ("Operators", ["operator", "count"], [[name, str(count)] for name, count in operators.most_common()]),
            (
                "Files",
                ["file", "bytes", "SHA-256"],
                [[name, f"{entry.size:,}", entry.sha256[:16]] for name, entry in artifact.files.items()],
            ),
        ],
    )
