"""One small artifact for all, and a copy of it for each test that damages it."""

import shutil

import pytest

from test_trust.samples import make_artifact


@pytest.fixture(scope="session")
def artifact(once):
    return once("trust", make_artifact) / "artifact"


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")
