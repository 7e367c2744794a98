"""What is in an artifact, for a person to read."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from runtime import ArtifactError
from runtime.artifact.integrity import read_artifact
from runtime.text.labels import label_names


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
    try:
        engines = _engine_tables(json.loads(artifact.manifest).get("engines", []))
    except (LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: an engine's layer table is damaged; build the engine again") from error
    names = label_names(artifact)
    labels = [("Labels", ["", "label"], [[str(index), name] for index, name in enumerate(names)])] if names else []
    return Inspection(
        summary,
        [
            (
                "Inputs and outputs",
                ["", "name", "shape", "dtype"],
                [[kind, value.name or "", str(value.shape), str(value.dtype)] for kind, value in values],
            ),
            ("Operators", ["operator", "count"], [[name, str(count)] for name, count in operators.most_common()]),
            *engines,
            *labels,
            (
                "Files",
                ["file", "bytes", "SHA-256"],
                [[name, f"{entry.size:,}", entry.sha256[:16]] for name, entry in artifact.files.items()],
            ),
        ],
    )


def _engine_tables(engines: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Of each engine its profiles, with the attention layers that are fused in them, and its layers by kind."""
    tables = []
    for engine in engines:
        layers = engine["layers"]
        title = (
            f"{engine['file']}: {engine['builder']} {engine['version']}, {engine['capacity']} tokens in each of "
            f"{engine['max_batch']} slots, compute capability {', '.join(engine['compute_capabilities'])}"
        )
        rows = [
            [
                profile["name"],
                " to ".join(str(size) for size in profile["sequence"][::2]),
                f"{sum(layer['fused'][index] for layer in layers['attention'])} of {len(layers['attention'])}",
            ]
            for index, profile in enumerate(engine["profiles"])
        ]
        tables.append((title, ["profile", "tokens a step", "attention fused"], rows))
        counts = [[kind, str(count)] for kind, count in layers["counts"].items()]
        tables.append((f"Layers of {engine['file']}", ["layer", "count"], counts))
    return tables
