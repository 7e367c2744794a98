"""The GPU suite's report, one file, to which each stage's result is added when the stage ends."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.backends.cuda import Device

PACKAGES = ("wm-models", "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-python")
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


@dataclass(frozen=True)
class Row:
    """One finding of a stage, with its limit where it has one."""

    what: str
    found: str
    limit: str = ""
    passed: bool = True


@dataclass
class Result:
    """What a stage found. `evidence`: texts that help to mend what failed. `reason`: why it was not run."""

    stage: str
    rows: list[Row] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    reason: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.reason is not None:
            return NOT_RUN
        return PASSED if self.rows and all(row.passed for row in self.rows) else FAILED

    def failures(self) -> str:
        return "; ".join(f"{row.what}: {row.found}" for row in self.rows if not row.passed) or "it found nothing"


class Report:
    """The file at `path`, which begins with the machine."""

    def __init__(self, path: Path, device: Device):
        self.path = path
        driver = device.driver.cuDriverGetVersion()[1]
        machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        self.path.write_text(
            f"# {device.name}\n\nCompute capability {device.capability}, driver's CUDA {driver // 1000}."
            f"{driver % 1000 // 10}, {machine}; " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + "\n"
        )

    def add(self, result: Result) -> None:
        """Write a stage's result behind the others'."""
        lines = [f"\n## {result.stage}: {result.verdict}, {result.seconds:.0f} s\n"]
        if result.reason is not None:
            lines.append(result.reason)
        if result.rows:
            lines += ["| what | found | limit | passed |", "| --- | --- | --- | --- |"]
            for row in result.rows:
                cells = (row.what, row.found, row.limit, "yes" if row.passed else "NO")
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for text in result.evidence:
            lines += ["", "```", text.rstrip(), "```"]
        with self.path.open("a") as file:
            file.write("\n".join(lines) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
