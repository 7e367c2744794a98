"""The eager model's answers: cases that share tokens are answered by one pass, as by passes of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import baseline, ours

from export.verification.reference import eager_logits, references

CHANGES = [{}, {"dynamic_mask_ratio": 0.3}, {"keep_window_size": 16}]


@pytest.mark.parametrize("changes", CHANGES, ids=["dense", "a share of keys", "a window"])
@pytest.mark.parametrize("text", [None, np.random.default_rng(1).integers(0, 211, (3, 40))], ids=["random", "text"])
def test_each_case_is_answered_for_what_its_slots_read(changes, text):
    model = ours(baseline(), **changes)
    bounds = SimpleNamespace(max_length=96, max_batch=4, window=None)
    answers, _ = references(model, bounds, text)
    assert [bool(reference.drawn) for reference in answers] == [False, True]
    plain = answers[0]
    assert {case.repeats for case in plain.cases} == ({False, True} if "keep_window_size" in changes else {False})
    for case, rows, found in zip(plain.cases, plain.sequences, plain.logits, strict=True):
        for prompt, ids, logits in zip(case.prompts, rows, found, strict=True):
            assert len(ids) == prompt + case.steps
            (expected,) = eager_logits(model, torch.from_numpy(ids)[None], np.arange(prompt - 1, len(ids)))
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
