"""What the GPU suite shares. On a card it writes `gpu-report.md` in the current folder."""

from pathlib import Path

import pytest

from runtime.backends.cuda import Device, start_driver
from runtime.errors import RequestError
from test_gpu.material import CARD, Material
from test_gpu.report import Report
from test_gpu.stages import Suite

REPORT = Path("gpu-report.md")


def lack() -> str | None:
    """Why nothing here can run on this machine, or None."""
    try:
        start_driver()
        Device()
    except RequestError as error:
        return str(error)
    return None


def open_suite(material: Material, report: Path) -> Suite:
    """A run on this machine's first GPU, which writes its report into the file `report`."""
    return Suite(material, Report(report, Device()))


def pytest_collection_modifyitems(items):
    mine = [item for item in items if item.get_closest_marker("gpu")]
    reason = lack() if mine else None
    for item in mine:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    return open_suite(Material(tmp_path_factory.mktemp("gpu"), CARD), REPORT)
