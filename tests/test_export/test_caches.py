"""Keys and values in int8: what is stored, how rows move, and which targets cannot take them.

B batch (slots), C cache capacity, K key/value heads, d head size.
"""

import numpy as np
import onnx_ir as ir
import pytest

from export import ExportError
from export.bench.cost import graph_parts, own_precision, step_costs
from export.targets.base import write_artifact
from export.targets.genai import GENAI, GenaiOptions
from export.targets.tensorrt import TENSORRT, TensorRTOptions
from runtime import load
from runtime.artifact.integrity import read_artifact
from runtime.backends.arrays import state_bytes
from runtime.backends.base import Options
from runtime.backends.registry import BACKENDS
from test_export.conftest import VARIANTS, lowered
from wm_models import DogeForCausalLM

NAME = "int8 cache"  # its window: 24 keys are kept, in caches of 40 rows
IDS = np.random.default_rng(0).permutation(200)[:80]


@pytest.fixture(scope="module")
def exact(exported, tmp_path_factory):
    """The same checkpoint with float caches."""
    directory, model = tmp_path_factory.mktemp("exact") / "artifact", DogeForCausalLM.from_pretrained(exported(NAME)[0])
    return lowered(directory, model, max_length=512, spare=VARIANTS[NAME][1]["spare"]).path


def opened(directory, slots=2):
    session = BACKENDS["cpu"].open(read_artifact(directory), Options())
    session.allocate(slots, session.graph.max_length)
    session.grow(session.graph.max_length)
    return session


def scale(directory, state):
    value = ir.load(directory / "model.onnx").graph.initializers[f"{state}.scale"].const_value
    return value.numpy()


def test_keys_and_values_are_int8_and_biases_are_not(exported):
    for name in ("int8 cache", "int8 cache, hybrid", "int8 cache, int4 experts"):
        graph = read_artifact(exported(name)[1]).graph
        kinds = {(state.input.rpartition(".")[2], state.dtype) for state in graph.states}
        assert {kind for kind in kinds if kind[0] in ("key", "value")} == {("key", "int8"), ("value", "int8")}
        assert ("bias", graph.dtype) in kinds
        assert graph.cache_dtype == "int8"


def test_a_stored_row_is_the_float_row_rounded(exported, exact):
    """In the first layer, whose input no other cache reaches: one scale a head, codes by numpy."""
    steps = IDS[:20]
    lengths = np.zeros(2, np.int64)
    rows = []
    for directory in (exported(NAME)[1], exact):
        session = opened(directory)
        session.step_slot(0, steps, lengths)
        rows.append(dict(zip((s.input for s in session.graph.states), session.read_rows(0, 0, 20), strict=True)))
    for part in ("key", "value"):
        state = f"layers.0.{part}"
        step = scale(exported(NAME)[1], state)[:, None, None]
        assert step.shape[0] == rows[1][state].shape[0]
        codes = np.clip(np.round(rows[1][state] / step), -128, 127)
        assert np.abs(codes - rows[0][state]).max() <= 1  # a tie may be rounded the other way
        assert (codes == rows[0][state]).mean() > 0.99
        assert np.abs(rows[0][state]).max(axis=(1, 2)).min() > 40  # the scale fits each head


def test_eviction_moves_the_rows_as_they_are(exported):
    session = opened(exported(NAME)[1])
    window, states = session.graph.window, session.graph.states
    lengths = np.zeros(2, np.int64)
    for start in (0, 16):
        session.step_slot(0, IDS[start : start + 16], lengths + start)
    before = {state.input: cache[0].copy() for state, cache in zip(states, session.caches, strict=True)}
    session.step_slot(0, IDS[32:48], lengths + 32)
    after = {state.input: cache[0] for state, cache in zip(states, session.caches, strict=True)}
    for name, cache in before.items():
        layer = name.rpartition(".")[0]
        kept = np.sort(np.argsort(-before[f"{layer}.bias"][:, :32, 0], axis=-1, kind="stable")[:, : window.keep])
        assert after[name].dtype == cache.dtype
        for head, rows in enumerate(kept):
            np.testing.assert_array_equal(after[name][head, : window.keep], cache[head, rows])


def test_rows_that_are_written_back_give_the_same_logits(exported):
    """What a shared prefix and a draft that is taken back need."""
    session, lengths = opened(exported(NAME)[1]), np.zeros(2, np.int64)
    session.step_slot(0, IDS[:20], lengths)
    session.write_rows(1, 0, session.read_rows(0, 0, 20))
    first, second = (session.step_slot(slot, IDS[20:21], np.array([20, 20])).copy() for slot in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_memory_and_what_a_step_reads_are_a_quarter(exported, exact):
    tokens = 20  # fewer than the window keeps
    bytes_read, bytes_held = [], []
    for directory in (exported(NAME)[1], exact):
        artifact = read_artifact(directory)
        biases = sum(state_bytes(s, 1, tokens) for s in artifact.graph.states if s.input.endswith("bias"))
        costs = step_costs(artifact, graph_parts(artifact), own_precision(artifact), 1, tokens)
        bytes_read.append(sum(cost.caches for cost in costs) - biases)
        session = opened(directory)
        states = zip(session.graph.states, session.memory, strict=True)
        bytes_held.append(sum(memory.nbytes for state, memory in states if not state.input.endswith("bias")))
    assert 4 * bytes_read[0] == bytes_read[1]
    assert 4 * bytes_held[0] == bytes_held[1]


def test_speculation_changes_no_answer(exported):
    with load(exported("int8 cache, int4 experts")[1]) as engine:
        prompt = np.tile(IDS[:5], 4).tolist()
        plain = list(engine.generate_ids(prompt, 20))
        engine.speculate("ngram")
        assert list(engine.generate_ids(prompt, 20)) == plain


@pytest.mark.parametrize(("target", "options"), [(TENSORRT, TensorRTOptions), (GENAI, GenaiOptions)])
def test_a_target_without_int8_caches_says_so(exported, tmp_path, target, options):
    with pytest.raises(ExportError, match=r"its keys and values are int8, and .*export without --kv-cache-dtype"):
        write_artifact(target, exported(NAME)[1], tmp_path / "out", options())
    assert not list(tmp_path.iterdir())


def test_genai_takes_no_such_option(exported, tmp_path):
    with pytest.raises(ExportError, match="--kv-cache-dtype is int8: onnxruntime-genai has one dtype for all caches"):
        write_artifact(GENAI, exported(NAME)[0], tmp_path / "out", GenaiOptions(kv_cache_dtype="int8"))
