"""A few random configurations; `python -m test_trust.differential` runs any number of them."""

import random

import pytest

from test_trust import differential
from test_trust.differential import TOKENS, Drawn, draw, run

EAGER = {"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("number", range(2))
def test_a_configuration_computes_the_same_everywhere(tmp_path, number):
    chosen = random.Random(f"ci/{number}")
    drawn = draw(chosen)
    assert run(Drawn(drawn.fields, {"max_length": 96, "max_batch": 2}), chosen, tmp_path).startswith(("ok", "refused"))


def test_an_engine_that_differs_is_found(tmp_path, monkeypatch):
    """Logits that are off by a little more than rounding are told."""
    inner = differential.load

    def wrong(*args, **options):
        engine = inner(*args, **options)
        append = engine.append
        monkeypatch.setattr(engine, "append", lambda ids: append(ids) * 1.001)
        return engine

    monkeypatch.setattr(differential, "load", wrong)
    result = run(Drawn(EAGER, {"max_length": 64, "max_batch": 1}), random.Random(0), tmp_path)
    assert result.startswith("failed: chunks differ by")
    assert TOKENS < 64
