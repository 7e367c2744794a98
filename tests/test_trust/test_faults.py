"""A bounded share of what `python -m test_trust.faults` does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_trust.faults import preloaded


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: cc builds the library that lets writes fail")
@pytest.mark.parametrize(("job", "every"), [("export", "12"), ("verify", "12"), ("sign", "1"), ("train", "50")])
def test_what_is_there_is_whole(job, every, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-P", "-m", "test_trust.faults", job, "--every", every, "--kills", "3"]
    environment = {**preloaded(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "whole" in done.stdout
