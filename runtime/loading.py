"""How a command loads an artifact: the options that every command shares."""

from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.backends.registry import AUTO, backend_names
from runtime.engine import Engine, load
from runtime.options import option


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What to compute on: `runtime.load`'s arguments of those names."""

    backend: str = option(AUTO, f"What to run on: {', '.join(backend_names())}.")
    device: int | None = option(None, "The GPU's index. Default: the first.")
    threads: int | None = option(None, "Threads to compute with. Default: the physical cores.")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(DeviceOptions):
    """How to load an artifact: the arguments of `runtime.load`."""

    public_key: Path | None = option(None, "Load only what the holder of this Ed25519 key (PEM) signed.")
    allow_unverified: bool = option(False, "Load what failed its checks.", flag="--allow-unverified")

    def load(self, directory: Path) -> Engine:
        """Raises what `runtime.load` raises."""
        return load(directory, **asdict(self))
