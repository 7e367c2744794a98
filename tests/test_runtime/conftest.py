"""Engines whose slots many sequences share."""

from functools import partial
from pathlib import Path

import pytest
from conftest import SMALL as SIZES
from conftest import baseline, ours, randomise
from test_export.conftest import PAIR, lowered, save_checkpoint

from export import OnnxOptions, export_onnx
from runtime import load
from wm_models import CheemsConfig, CheemsForCausalLM

SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"  # float32, 3 slots, windows of 40 rows, a tokenizer
LENGTH = 192
MODELS = {
    "dense": {},
    "one head": {"num_key_value_heads": 1},
    "eviction": {"keep_window_size": 24},
    "hybrid": PAIR,
}
# int8: several blocks to a row, whose sums a kernel may take in another order
OPTIONS = {
    "int8": {"quantize": "int8", "block_size": 16},
    "int8 caches": {"kv_cache_dtype": "int8"},
    "all logits": {"logits": "all"},
}


def model_of(name):
    if name != "hybrid":
        return ours(baseline(**MODELS[name]), expert_routing="token")
    model = CheemsForCausalLM(CheemsConfig(**{**SIZES, **MODELS[name]}))
    randomise(model)
    return model


def make(name, root):
    if name in OPTIONS:
        checkpoint = save_checkpoint(root / "checkpoint")
        export_onnx(checkpoint, root / "artifact", OnnxOptions(max_length=LENGTH, max_batch=3, **OPTIONS[name]))
    else:
        spare = {"spare": 16} if name == "eviction" else {}
        lowered(root / "artifact", model_of(name), max_length=LENGTH, max_batch=3, **spare)


@pytest.fixture(scope="session")
def engines(once):
    """`engines(name)`: a new engine over an artifact of 3 slots of LENGTH tokens.

    float32 models: dense, with one key/value head, whose cache rows are evicted, with SSD layers, with the logits of
    every token, with int8 keys and values; an int8 model; and "window", with windows of 40 rows, which is stored.
    """

    def engine(name):
        directory = SMALL if name == "window" else once(f"runtime, {name}", partial(make, name)) / "artifact"
        return load(directory, threads=1)

    return engine


@pytest.fixture(scope="module", params=["one head", "int8", "int8 caches", "hybrid", "window"])
def engine(request, engines):
    return engines(request.param)


@pytest.fixture(scope="module")
def small():
    return load(SMALL, threads=1)
