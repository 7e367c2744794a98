"""On a GPU: engines against the eager model, replayed decode steps, and tokens a second. `pytest -m gpu`."""

import numpy as np
import pytest

from export import TensorRTOptions, build_tensorrt
from export.bench.measure import BaselineOptions, measure
from export.verification.cases import Case
from export.verification.comparison import compare
from export.verification.judging import run_case
from export.verification.reference import eager_logits
from runtime import load
from runtime.bench import BenchOptions
from wm_models import create

PRESET, LENGTH = "doge-20m", 1024
LIMIT = 1e-3  # of float32 logits, times max(1, max|logit|), and of the mean KL of the narrower types
CASES = [
    Case("prompt 17, 512 steps", (17,), 512, (0,)),
    Case("prompt 700, 64 steps", (700,), 64, (0,)),
    Case("ragged batch with idle slots", (5, 33, 20, 1), 64, (0, 2, 3, 5)),
]


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def artifact(request, tmp_path_factory, report):
    directory = tmp_path_factory.mktemp("gpu") / request.param
    engine = build_tensorrt(PRESET, directory, TensorRTOptions(dtype=request.param, max_batch=4, max_length=LENGTH))
    report(f"{PRESET} {request.param}: {engine['builder']} {engine['version']}", f"{engine['build']['seconds']:.0f} s")
    return directory


@pytest.fixture(scope="module")
def answers():
    """Each case's tokens and the eager model's logits for them."""
    model, draw, found = create(PRESET), np.random.default_rng(0), []
    import torch

    for case in CASES:
        rows = [draw.integers(0, model.config.vocab_size, length + case.steps) for length in case.prompts]
        logits = [eager_logits(model, torch.from_numpy(r), at - 1) for r, at in zip(rows, case.prompts, strict=True)]
        found.append((case, rows, logits))
    return found


WAYS = {"TensorRT engine": {"backend": "tensorrt"}, "ONNX Runtime, CUDA": {"backend": "cuda"}}


@pytest.mark.parametrize("way", WAYS)
def test_parity_with_the_eager_model(artifact, answers, report, way):
    engine = load(artifact, **WAYS[way])
    failed = []
    for case, rows, logits in answers:
        verdict = compare(case, logits, run_case(engine, case, rows), None)
        exact = engine.graph.dtype == "float32"
        found = verdict.max_difference if exact else verdict.mean_kl
        limit = LIMIT * max(1.0, max(float(np.abs(row).max()) for row in logits)) if exact else LIMIT
        passed = bool(np.isfinite(found)) and found <= limit
        measure_name = "max |Δlogit|" if exact else "mean KL"
        report(f"{way}, {engine.graph.dtype}, {case.name}: {measure_name}", f"{found:.1e}", f"{limit:.1e}", passed)
        failed += [] if passed else [case.name]
    assert not failed


def test_decode_is_replayed_as_a_cuda_graph(artifact, report):
    """The same tokens, replayed or not."""
    engine = load(artifact, backend="tensorrt")
    replayed = engine.generate_ids([5, 6, 7], 64)
    captured = engine.session._graphs.get(1) is not None
    plain = load(artifact, backend="tensorrt")
    plain.session._capturable = lambda context: False
    assert plain.generate_ids([5, 6, 7], 64) == replayed
    report(f"{engine.graph.dtype}: decode captured as a CUDA graph", "yes" if captured else "the engine forbids it")


def test_speed(artifact, report):
    """Batch 1, prompt 128, 128 new tokens: a figure for the report, and no limit."""
    result = measure(artifact, BenchOptions(backend="tensorrt"), BaselineOptions(["torch-compile"]))
    report(f"{result['dtype']}: decode, tokens/s", f"{result['decode_tokens_per_second']:.0f}")
    baseline = result["baselines"]["torch-compile"]
    report(f"{result['dtype']}: times torch.compile's tokens/s", f"{baseline['times_as_fast']:.2f}")


def test_memory_comes_back(artifact):
    engine = load(artifact, backend="tensorrt")
    driver = engine.session.device.driver
    engine.session.allocate(4, LENGTH)
    engine.session.release()
    before = driver.cuMemGetInfo()[1]
    for _ in range(3):
        engine.session.allocate(4, LENGTH)
        engine.session.release()
    assert driver.cuMemGetInfo()[1] == before
