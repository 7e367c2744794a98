"""Windows over a long text: those of lm-eval, for every length and stride."""

import numpy as np
import pytest
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from runtime.evaluation.windows import windows


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 23, 40])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 1), (8, 3), (8, 7), (1, 1), (40, 5), (64, 64)])
def test_they_are_those_of_lm_eval(count, length, stride):
    ids = list(range(100, 100 + count))
    expected = [
        make_disjoint_window(window) for window in get_rolling_token_windows(ids, 7, length, length - stride + 1)
    ]
    found = list(windows(np.array(ids), 7, length, stride))
    assert len(found) == len(expected)
    for window, (context, continuation) in zip(found, expected, strict=True):
        assert window.ids.tolist() == [*context, *continuation][:-1]
        assert window.targets.tolist() == continuation
        assert window.first == len(context) - 1
        assert ids[window.start : window.start + len(continuation)] == continuation
    assert sum(window.targets.size for window in found) == count  # each token once
