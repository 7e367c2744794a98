"""One small artifact for all, and a copy of it for each test that damages it."""

import shutil

import pytest

from test_trust.samples import make_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")
