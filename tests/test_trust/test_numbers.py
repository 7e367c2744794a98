"""Numbers that should not be: in weights, in biases, in logits, and at the edges of sampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export import ExportError, OnnxOptions, export_onnx
from runtime import RequestError, load
from runtime.text.sampling import Sampler, Sampling
from test_trust.samples import make_checkpoint
from wm_models import DogeForCausalLM


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint")


def spoil(checkpoint, change):
    model = DogeForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path, value):
    def change(layers):
        layers[1].mlp.up_proj.weight[7, 3] = value
        layers[0].self_attn.A[0] = value

    spoil(checkpoint, change)
    with pytest.raises(ExportError) as caught:
        export_onnx(checkpoint, tmp_path / "artifact")
    for words in ("layers.1.mlp.up_proj.weight: 1 of 1536 not finite", "at [7, 3]", "layers.0.self_attn.A", str(value)):
        assert words in str(caught.value)
    assert not (tmp_path / "artifact").exists()


def test_weights_beyond_the_dtype_are_named(checkpoint, tmp_path):
    spoil(checkpoint, lambda layers: layers[1].input_residual[3:5].fill_(7e4))
    with pytest.raises(ExportError, match=r"layers\.1\.input_residual: 2 of 32 beyond float16"):
        export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(dtype="fp16"))


@pytest.mark.parametrize(("strength", "dtypes"), [(12.0, ["fp16"]), (100.0, ["fp16", "bf16", "fp32"])])
def test_biases_beyond_the_dtype_are_found_on_activations(checkpoint, tmp_path, strength, dtypes):
    """A is an ordinary number; only with the activations does the exponent pass what the dtype holds."""

    def change(layers):
        attention = layers[1].self_attn
        attention.A.fill_(1.0)
        attention.dt_proj.weight.mul_(strength / 3)

    spoil(checkpoint, change)
    for dtype in dtypes:
        with pytest.raises(ExportError, match=r"layers\.1\.self_attn.*reaches e\^.*--dtype|logits are not finite"):
            export_onnx(checkpoint, tmp_path / dtype, OnnxOptions(dtype=dtype, max_length=60))
    assert not [path for path in tmp_path.iterdir() if path.name != "checkpoint"]


def test_a_model_whose_own_logits_are_not_finite(checkpoint, tmp_path):
    spoil(checkpoint, lambda layers: layers[1].mlp.down_proj.weight.fill_(3e38))
    with pytest.raises(ExportError, match="logits are not finite"):
        export_onnx(checkpoint, tmp_path / "artifact", OnnxOptions(max_length=60))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_generation(artifact, temperature):
    engine = load(artifact)
    run, calls = engine.session.session.run_with_iobinding, []

    def broken(binding):
        run(binding)
        calls.append(1)
        if len(calls) == 4:
            next(iter(engine.session._bound.values())).logits[..., 5] = math.nan

    engine.session.session.run_with_iobinding = broken
    stream = engine.stream_ids([1, 2, 3], 10, temperature=temperature)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(RequestError, match="slot 0 after token 6 are not finite"):
        next(stream)


LOGITS = np.array([[1.0, 3.0, 2.0, -4.0, 3.0]], np.float32)


def draws(count=300, logits=LOGITS, **options):
    sampler = Sampler(Sampling(seed=0, **options))
    return {int(sampler(logits, [[]])[0]) for _ in range(count)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.0}, {1}),  # the first of equals
        ({"temperature": 5e-324}, {1, 4}),
        ({"temperature": 1e-310, "top_p": 0.5}, {1}),
        ({"temperature": 1e308}, {0, 1, 2, 3, 4}),
        ({"temperature": 1.0, "top_p": 0.0}, {1}),
        ({"temperature": 1.0, "top_p": 1.0}, {0, 1, 2, 4}),
        ({"temperature": 1.0, "top_p": 5e-324}, {1}),
        ({"temperature": 1.0, "top_k": 1}, {1, 4}),  # a tie
        ({"temperature": 1.0, "top_k": 5}, {0, 1, 2, 4}),
        ({"temperature": 1.0, "top_k": 10**30}, {0, 1, 2, 4}),
        ({"temperature": 1e308, "top_k": 3}, {1, 2, 4}),
    ],
)
def test_edges_of_sampling(options, expected):
    assert draws(**options) == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e300, 1.7e308])
def test_penalties_saturate(penalty):
    logits = np.array([[5.0, -5.0, 1.0]], np.float32)
    for temperature in (0.0, 1.0):
        token = int(Sampler(Sampling(temperature, repetition_penalty=penalty, seed=0))(logits, [[0, 1]])[0])
        assert token == (0 if penalty < 1 else 2)


@pytest.mark.parametrize(
    "options",
    [{"temperature": math.inf}, {"temperature": math.nan}, {"top_p": math.nan}, {"top_p": -0.1}, {"top_k": 1.5},
     {"repetition_penalty": math.nan}, {"repetition_penalty": math.inf}, {"seed": -1}, {"seed": 0.5}],
)  # fmt: skip
def test_values_outside_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_drawn_from(value, temperature):
    logits = LOGITS.copy()
    logits[0, 3] = value
    with pytest.raises(RequestError, match="logit"):
        Sampler(Sampling(temperature))(logits, [[]])
    with pytest.raises(RequestError, match="logit"):
        Sampler(Sampling(temperature))(np.full_like(LOGITS, -math.inf), [[]])


@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    st.floats(0, 1e308),
    st.integers(0, 12),
    st.floats(0, 1),
    st.floats(1e-300, 1e300),
    st.integers(0, 2**32),
)
def test_a_token_is_always_one_that_may_be_drawn(values, temperature, top_k, top_p, penalty, seed):
    logits = np.array([values], np.float32)
    token = int(Sampler(Sampling(temperature, top_k, top_p, penalty, seed))(logits, [[0]])[0])
    assert 0 <= token < len(values)
    if penalty == 1.0 and 0 < top_k < len(values):
        assert (logits[0] > logits[0, token]).sum() < top_k
