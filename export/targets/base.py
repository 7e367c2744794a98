"""What a target is: how an artifact is written, and how it is loaded to compare it with the eager model."""

import logging
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from export.errors import ExportError
from export.package.directory import check_free, replacing
from export.package.manifest import write_manifest
from export.progress import SILENT, Progress
from export.reporting.document import write_report
from export.source import Source
from export.verification.comparison import Comparison, summary
from export.verification.judging import Expected, check_artifact
from export.verification.record import Origin, record_comparisons
from runtime.artifact.manifest import Artifact, Graph, Manifest
from runtime.backends.base import Options as SessionOptions
from runtime.backends.base import Session
from runtime.backends.registry import BACKENDS
from wm_models.decoder import DecoderWithHead

Options = TypeVar("Options")
log = logging.getLogger(__name__)


class Table(NamedTuple):
    """What `wm-export inspect` shows: a title, the columns' titles, and rows of cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Draft:
    """An artifact that is being written in `directory`, which takes its place once it is whole.

    `source` and `seed` say where the model comes from. `manifest`: what manifest.json will say, but for the list of
    files and the verdict; a target sets it, and adds its own section. `opened`: see `open_source`.
    `report`: whether report.html is to lie beside the graph, which a target's options may ask for.
    """

    directory: Path
    source: str
    seed: int = 0
    progress: Progress = SILENT
    opened: Source | None = None
    manifest: Manifest = field(init=False)
    report: bool = field(default=False, init=False)

    def open_source(self) -> Source:
        """What the model is made of, which is opened once."""
        if self.opened is None:
            self.opened = Source(self.source, self.seed)
        return self.opened

    def load_model(self) -> DecoderWithHead:
        """The eager model, in float32."""
        return self.open_source().load_model()

    def copy_texts(self, model: DecoderWithHead) -> None:
        """Write config.json, and the tokenizer's and the generation's files of the source, into the directory."""
        self.open_source().copy_texts(model, self.directory)

    def origin(self, target: str) -> Origin:
        """What verification.json says of where this comes from."""
        source = os.path.abspath(self.source) if os.path.isdir(self.source) else self.source
        return Origin(source, self.seed, target, self.opened.hashes() if self.opened else {})

    def add_section(self, name: str, value: Any) -> None:
        """Give the manifest a section of the target's own, in the place of one of this name; `value` becomes JSON."""
        self.manifest = replace(self.manifest, sections={**self.manifest.sections, name: value})


def check_float_caches(graph: Graph, source: str, reason: str) -> None:
    """Raise `ExportError` where the caches are int8, which a target cannot take for this `reason`."""
    if graph.cache_dtype == "int8":
        raise ExportError(f"{source}: its keys and values are int8, and {reason}; export without --kv-cache-dtype")


class Target(ABC, Generic[Options]):
    """One kind of artifact. Registered in `export.targets.registry`, it is a subcommand of wm-export.

    `options`: a dataclass whose fields are declared with `runtime.console.option`, of defaults only.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    options: type[Options]
    source_help: ClassVar[str] = (
        "The directory of a checkpoint or of a PEFT adapter, the shipped model, or a preset's name for random weights."
    )

    @abstractmethod
    def write(self, draft: Draft, options: Options) -> Expected | None:
        """Write the draft's files and fill its manifest.

        Returns what the artifact is to be compared with, or None where it was made of one that is verified already.
        """

    def finish(self, draft: Draft, expected: Expected | None) -> list[Comparison]:
        """Compare what was written, by default an artifact that the runtime loads, and record the verdict.

        No comparison is made where None is expected.
        """
        if expected is None:
            write_manifest(draft.directory, draft.manifest, verified=True)
            return []
        files = write_manifest(draft.directory, draft.manifest, verified=False)
        comparisons = check_artifact(draft.directory, expected, self.open, draft.progress)
        origin = draft.origin(self.name)
        if draft.report:
            names = [path.name for path in draft.directory.iterdir()]
            write_report(draft.directory, draft.manifest, origin, comparisons, names)
        record_comparisons(draft.directory, draft.manifest, origin, comparisons, files)
        return comparisons

    def open(self, artifact: Artifact) -> Session:
        """Load the artifact for its comparison with the eager model; by default, its graph in ONNX Runtime on a CPU."""
        return BACKENDS["cpu"].open(artifact, SessionOptions())

    def tables(self, manifest: Manifest) -> list[Table]:
        """What `wm-export inspect` shows of this target's section of the manifest, if it has one."""
        return []

    def summary(self, directory: Path, manifest: Manifest) -> list[str]:
        """Lines that the command line prints once the artifact is written."""
        return []


@dataclass(frozen=True)
class Written:
    """An artifact in its place: its manifest, but for the list of files, and its comparisons with the eager model."""

    manifest: Manifest
    comparisons: list[Comparison]


def write_artifact(
    target: Target[Options],
    source: str | Path,
    out: str | Path,
    options: Options,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Progress = SILENT,
) -> Written:
    """Write the artifact directory `out` by way of a target, and compare it with the eager model.

    `source`: a checkpoint directory, the shipped model or a preset's name, whose random weights come from `seed`.
    `force` replaces what `out` holds once the new artifact is whole. An artifact that fails a comparison is kept for
    inspection, but loads only with `allow_unverified=True`. Raises `ExportError`, `wm_models.CheckpointError`, OSError.
    """
    out, began = Path(out), time.monotonic()
    try:
        check_free(out, force)  # before any work is done
        with replacing(out, force) as directory:
            draft = Draft(directory, os.fspath(source), seed, progress)
            comparisons = write_verified(target, draft, options)
    except Exception as error:
        log.warning("refused to export %s to %s with target %s: %s", source, out, target.name, error)
        raise
    seconds, graph = time.monotonic() - began, draft.manifest.graph
    log.info(
        "exported %s to %s: target %s, %s, quantization %s, %s, %.1f s",
        source, out, target.name, graph.dtype, graph.quantization, summary(comparisons), seconds,
    )  # fmt: skip
    return Written(draft.manifest, comparisons)


def write_verified(target: Target[Options], draft: Draft, options: Options) -> list[Comparison]:
    """Have the target write the draft, compare it, and record the verdict; none is made where None is expected."""
    return target.finish(draft, target.write(draft, options))
