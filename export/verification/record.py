"""verification.json: what an artifact was compared with, and each comparison's figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from export.errors import ExportError
from export.package.directory import write_json
from export.package.manifest import write_manifest
from export.source import is_local
from export.verification.comparison import Comparison
from runtime.artifact.manifest import Artifact, File, Manifest

VERIFICATION, REPORT = "verification.json", "report.html"  # both are written anew after a comparison
FIRST_TARGET = "onnx"  # of an artifact whose record names none


@dataclass(frozen=True)
class Origin:
    """The eager model that an artifact was made of, and the target that wrote it: `--source`, `--seed`, and a name.

    `files`: the SHA-256 of each file that the model was loaded from, or that was copied; none of a preset.
    """

    source: str
    seed: int = 0
    target: str = FIRST_TARGET
    files: Mapping[str, str] = field(default_factory=dict)


def record_comparisons(
    directory: Path,
    manifest: Manifest,
    origin: Origin,
    comparisons: Sequence[Comparison],
    known: Mapping[str, File],
    names: Iterable[str] | None = None,
) -> None:
    """Write verification.json, and the manifest with the verdict and all files, or those of these `names` alone.

    `known`: the entries of the files that were compared, which are not hashed again.
    """
    passed = write_record(directory, origin, comparisons)
    known = {name: file for name, file in known.items() if name not in (VERIFICATION, REPORT)}
    write_manifest(directory, manifest, passed, None if names is None else sorted({*names, VERIFICATION}), known)


def write_record(directory: Path, origin: Origin, comparisons: Sequence[Comparison]) -> bool:
    """Write verification.json; returns whether every comparison passed."""
    passed = all(comparison.passed for comparison in comparisons)
    record = {
        "source": {"source": origin.source, "seed": origin.seed, "files": dict(origin.files)},
        "target": origin.target,
        "passed": passed,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_json(directory / VERIFICATION, record)
    return passed


def read_origin(artifact: Artifact, source: str | None) -> Origin:
    """What verification.json names, or `source` in its place.

    An artifact may come from somebody else, so what it names is loaded only from this machine: a directory, the
    shipped model or a preset. Raises `ExportError`.
    """
    path, record = artifact.path / VERIFICATION, artifact.read_json(VERIFICATION)
    target = record.get("target", FIRST_TARGET)
    if not isinstance(target, str):
        raise ExportError(f"{path}: target is {type(target).__name__}; expected a target's name; export again")
    if source is not None:
        return Origin(source, target=target)
    named = record.get("source")
    named = named if isinstance(named, dict) else {}
    source, seed = named.get("source"), named.get("seed", 0)
    if not isinstance(source, str) or not isinstance(seed, int):
        raise ExportError(f"{path}: names no source to compare with; name the checkpoint with --source")
    if not is_local(source):
        raise ExportError(
            f"{path}: names the source {source[:200]!r}, which is no directory here, no preset and not the shipped "
            "model; name the checkpoint with --source"
        )
    return Origin(source, seed, target)
