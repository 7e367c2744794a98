"""Engines whose slots many sequences share."""

from pathlib import Path

import pytest
from conftest import SMALL as SIZES
from conftest import baseline, ours, randomise
from test_export.conftest import HYBRID, lowered, save_checkpoint

from export import OnnxOptions, export_onnx
from runtime import load
from wm_models import CheemsConfig, CheemsForCausalLM

SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"  # float32, 3 slots, windows of 40 rows, a tokenizer
LENGTH = 192
# int8: several blocks to a row, whose sums a kernel may take in another order
OPTIONS = {
    "int8": {"quantize": "int8", "block_size": 16},
    "int8 caches": {"kv_cache_dtype": "int8"},
    "all logits": {"logits": "all"},
}


def model_of(name):
    if name == "one head":
        return ours(baseline(num_key_value_heads=1), expert_routing="token")
    model = CheemsForCausalLM(CheemsConfig(**SIZES, **HYBRID))
    randomise(model)
    return model


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """`engines(name)`: float32 models with one key/value head, with SSD layers, with a window, with the logits of every
    token, with int8 keys and values, and an int8 model.
    """
    made = {"window": SMALL}

    def engine(name):
        if name not in made:
            directory = made[name] = tmp_path_factory.mktemp("made") / name
            if name in OPTIONS:
                checkpoint = save_checkpoint(directory.parent / "checkpoint")
                export_onnx(checkpoint, directory, OnnxOptions(max_length=LENGTH, max_batch=3, **OPTIONS[name]))
            else:
                lowered(directory, model_of(name), max_length=LENGTH, max_batch=3)
        return load(made[name], threads=1)

    return engine


@pytest.fixture(scope="module", params=["one head", "int8", "int8 caches", "hybrid", "window"])
def engine(request, engines):
    return engines(request.param)


@pytest.fixture(scope="module")
def small():
    return load(SMALL, threads=1)
