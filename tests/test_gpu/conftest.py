"""What the GPU suite shares: the engines, and the report that it writes, `gpu-report.md` in the current folder."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from runtime.backends.cuda import Device, start_driver
from runtime.errors import RequestError

REPORT = Path("gpu-report.md")
PACKAGES = ("wm-models", "torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python")


def lack() -> str | None:
    """Why nothing here can run on this machine, or None."""
    try:
        start_driver()
        Device()
    except RequestError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items):
    mine = [item for item in items if "test_gpu" in item.nodeid]
    reason = lack() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def report():
    """`report(what, found, limit, passed)`: a row of the report, which is written when all is done."""
    rows: list[tuple[str, str, str, str]] = []
    yield lambda what, found, limit="", passed=True: rows.append((what, found, limit, "yes" if passed else "NO"))
    device = Device()
    driver = device.driver.cuDriverGetVersion()[1]
    lines = [
        f"# {device.name}",
        "",
        f"Compute capability {device.capability}, driver's CUDA {driver // 1000}.{driver % 1000 // 10}, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; "
        + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "",
        "| what | found | limit | passed |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    REPORT.write_text("\n".join(lines))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
