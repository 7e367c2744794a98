"""The manifest's section `engines`: the TensorRT engines that lie beside the graph.

B batch (slots), S new tokens, C cache capacity.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from runtime.artifact.manifest import MANIFEST, MOST_SLOTS, MOST_STATES, MOST_TOKENS, Artifact, Size, shown
from runtime.backends.tensorrt_editions import MODULES
from runtime.errors import ArtifactError

ENGINES = "engines"
MOST_ENGINES = 64
Bounds = tuple[Size, Size, Size]
Capability = Annotated[str, Meta(pattern=r"^\d{1,3}\.\d\Z")]


@dataclass(frozen=True)
class Profile:
    """The smallest, usual and largest numbers of slots B and of new tokens S of one way to run an engine."""

    name: str
    batch: Bounds
    sequence: Bounds

    def __post_init__(self) -> None:
        for name, sizes in (("batch", self.batch), ("sequence", self.sequence)):
            if list(sizes) != sorted(sizes):
                raise ValueError(f"{name} is {shown(sizes)}; expected three rising sizes")


@dataclass(frozen=True)
class EngineFile:
    """An engine: its file, who built it for what, and how large its slots are.

    `compute_capabilities`: GPUs that it has code for, such as "8.9". `capacity`: C, which is fixed. `aliased`: outputs
    that are written where their input lies. `log`, `layers` and `build` are the exporter's report.
    """

    file: str
    builder: str
    version: str
    compute_capabilities: Annotated[tuple[Capability, ...], Meta(min_length=1, max_length=16)]
    capacity: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    max_batch: Annotated[int, Meta(ge=1, le=MOST_SLOTS)]
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1, max_length=16)]
    aliased: Annotated[tuple[str, ...], Meta(max_length=MOST_STATES)]
    log: str | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.builder not in MODULES:
            raise ValueError(f"builder is {shown(self.builder)}; expected one of {', '.join(MODULES)}")


Entries = Annotated[tuple[EngineFile, ...], Meta(max_length=MOST_ENGINES)]


def engine_entries(artifact: Artifact) -> tuple[EngineFile, ...]:
    """The artifact's engines, of which there need not be any. Raises `ArtifactError`."""
    entries: tuple[EngineFile, ...] = artifact.section(ENGINES, Entries) or ()  # type: ignore[arg-type]
    for index, engine in enumerate(entries):
        if engine.file not in artifact.files:
            raise ArtifactError(
                f"{artifact.path / MANIFEST}: {ENGINES}[{index}]: its file {shown(engine.file)} is not among the "
                "manifest's files"
            )
    return entries
