"""On a GPU, stage by stage: `pytest -m gpu`. What each found is in `gpu-report.md`."""

import pytest

from test_gpu.report import NOT_RUN, PASSED
from test_gpu.stages import STAGES


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage(suite, stage):
    result = suite.run(stage)
    if result.verdict == NOT_RUN:
        pytest.skip(result.reason)
    assert result.verdict == PASSED, result.failures()
