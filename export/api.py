"""What Python programs call: one function a command of wm-export."""

import logging
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from export.package.directory import revising
from export.package.signing import sign
from export.progress import SILENT, Progress
from export.reporting.document import write_report
from export.source import Source
from export.targets.base import write_artifact
from export.targets.onnx_artifact import ONNX, OnnxOptions
from export.targets.registry import find_target
from export.targets.tensorrt import TENSORRT, TensorRTOptions
from export.verification.comparison import Comparison, summary
from export.verification.judging import Expected, check_artifact
from export.verification.record import REPORT, read_origin, record_comparisons
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, parse_manifest
from runtime.artifact.signature import SIGNATURE
from runtime.backends.tensorrt_entry import ENGINES

log = logging.getLogger(__name__)

__all__ = ["build_tensorrt", "export_onnx", "sign", "verify"]


def export_onnx(
    source: str | Path,
    out: str | Path,
    options: OnnxOptions = OnnxOptions(),  # noqa: B008 it is frozen
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress = SILENT,
) -> list[Comparison]:
    """Export `source` into the artifact directory `out`, and compare it with the eager model.

    `source`: a checkpoint directory, the shipped model's name, or a preset's for random weights from `seed`. `force`
    replaces what `out` holds once the new artifact is whole.

    Returns the comparisons. An artifact that fails one is kept for inspection, but loads only with
    `allow_unverified=True`. Raises `ExportError`, `wm_models.CheckpointError`, OSError.
    """
    return write_artifact(ONNX, source, out, options, seed=seed, force=force, progress=progress).comparisons


def build_tensorrt(
    source: str | Path,
    out: str | Path,
    options: TensorRTOptions = TensorRTOptions(),  # noqa: B008 it is frozen
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the artifact directory `out`: the ONNX artifact of `source`, and an engine for it beside the graph.

    `source`: an artifact, which is copied, or what `export_onnx` takes.

    Returns the engine's entry in the manifest. Raises `ExportError`, which has the builder's words where it refuses,
    `VerificationError` where the ONNX graph is not the eager model's, and what `export_onnx` raises.
    """
    written = write_artifact(TENSORRT, source, out, options, seed=seed, force=force, progress=progress)
    return written.manifest.sections[ENGINES][-1]


def verify(directory: str | Path, source: str | None = None, *, progress: Progress = SILENT) -> list[Comparison]:
    """Compare an artifact with its eager model again, and renew its verdict.

    `source`: the checkpoint directory or preset, where it is no longer what verification.json names. A signed artifact
    that passes again stays as it is; where the verdict changes, the signature is removed.
    Raises `runtime.ArtifactError` for a damaged artifact, `ExportError` where there is no source to compare with.
    """
    began, artifact = monotonic(), read_artifact(Path(directory), allow_unverified=True)
    origin = read_origin(artifact, source)
    target, opened = find_target(origin.target), Source(origin.source, origin.seed)
    with revising(artifact) as new:
        comparisons = check_artifact(new, Expected(opened.load_model), target.open, progress)
        stands = artifact.verified and all(comparison.passed for comparison in comparisons)
        if not (stands and (new / SIGNATURE).exists()):
            (new / SIGNATURE).unlink(missing_ok=True)
            manifest = parse_manifest(artifact.manifest, artifact.path / MANIFEST)
            origin = replace(origin, files=opened.hashes())
            if REPORT in artifact.files:
                write_report(new, manifest, origin, comparisons, artifact.files)
            record_comparisons(new, manifest, origin, comparisons, artifact.files, artifact.files)
    log.info("verified %s against %s: %s, %.1f s", directory, origin.source, summary(comparisons), monotonic() - began)
    return comparisons
