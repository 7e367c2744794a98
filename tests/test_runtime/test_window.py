"""Caches of a few rows more than the keep window give what caches with every row do."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import baseline, ours
from hypothesis import given
from hypothesis import strategies as st
from test_export.conftest import lowered

from runtime import ArtifactError, load
from runtime.backends import cuda
from runtime.backends import ort_gpu as onnx_gpu
from runtime.backends.eviction import largest_rows
from runtime.batch import generate_many
from runtime.prompts import Prompt
from test_runtime.standin import Driver, OrtSession
from wm_models.layers.attention import keep_largest

KEEP, SPARE, LENGTH = 20, 12, 200


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same model twice: with caches of 32 rows, and of as many as there are tokens."""
    root = tmp_path_factory.mktemp("made")

    def make(name, spare):
        changes = {"num_hidden_layers": 2, "keep_window_size": KEEP, "eos_token_id": None}
        model = ours(baseline(**changes), expert_routing="token")
        return lowered(root / name, model, max_batch=3, max_length=LENGTH, spare=spare).path

    return make("few", SPARE), make("all", LENGTH)


def prompts(*lengths):
    """No token twice: which of equal biases is kept would turn on the last bit of different products."""
    draw = np.random.default_rng(0)
    return [draw.permutation(211)[:length].tolist() for length in lengths]


@given(st.data())
def test_largest_rows(data):
    """As the model's own selection, ties included."""
    keep = data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(keep, 12))
    bias = np.array(data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=rows, max_size=rows)))
    visible = torch.ones(1, 1, 1, rows, dtype=torch.bool)
    expected = keep_largest(torch.from_numpy(bias)[None, None, None], visible, keep)[0, 0, 0] > 0
    assert largest_rows(bias[None], keep)[0].tolist() == expected.nonzero()[:, 0].tolist()


def ragged(engine):
    """Logits of a ragged batch, longer than a step takes, then of steps with an idle slot, up to a full one."""
    rows, new, found = prompts(LENGTH, LENGTH, LENGTH), np.array([150, 3, 40]), []
    ids = np.array([row[:150] for row in rows])
    found.append(engine.prefill(ids, new).copy())
    held = new.copy()
    for step in range(50):
        active = np.array([1, 1, step % 3 > 0])
        ids = np.array([[row[at]] for row, at in zip(rows, held, strict=True)])
        found.append(engine.prefill(ids, active)[active > 0].copy())
        held += active
    return np.concatenate(found)


def test_it_is_the_same(made):
    few, all_ = load(made[0]), load(made[1])
    np.testing.assert_allclose(ragged(few), ragged(all_), rtol=0, atol=1e-5)
    rows = {state.input: cache.shape[2] for state, cache in zip(few.graph.states, few.session.caches, strict=True)}
    assert set(rows.values()) == {KEEP + SPARE}
    assert few.session.eviction.evicted.min() > 0
    assert {cache.shape[2] for cache in all_.session.caches} == {LENGTH}


def test_sequences_join_and_leave(made):
    """A slot forgets what was evicted from its last sequence, and the others do not notice."""
    given = [Prompt(line, {}, ids) for line, ids in enumerate(prompts(90, 5, 31, 60, 1, 33, 120))]
    found = [{p.line: ids for p, ids in generate_many(load(path), given, 50, slots=2)} for path in made]
    assert found[0] == found[1]
    engine = load(made[0])
    assert all(found[0][prompt.line] == engine.generate_ids(prompt.ids, 50) for prompt in given)


@pytest.mark.parametrize("backend", ["cuda", "ort-tensorrt"])
def test_caches_in_a_gpu(made, monkeypatch, backend):
    """Over stand-ins for the driver and the provider: rows are taken out on the host, and put back."""
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: Driver())
    monkeypatch.setattr(onnx_gpu, "missing", lambda provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OrtSession)
    engine = load(made[0], backend)
    monkeypatch.undo()
    np.testing.assert_allclose(ragged(engine), ragged(load(made[1])), rtol=0, atol=1e-5)
    engine.session.close()
    assert engine.session.device.driver.used == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"window": {"keep": 32, "rows": 32}}, "keep is 32; expected 1 to 31"),
        ({"window": {"keep": 8, "rows": 201}}, "rows is 201; expected 1 to 200"),
        ({"window": {"keep": 8}}, "graph.window.rows is missing"),
        ({"window": 3}, "graph.window is int; expected object"),
        ({"window": None}, "graph.window is null"),
    ],
)
def test_a_bad_window(made, tmp_path, edit, words):
    directory = shutil.copytree(made[0], tmp_path / "copy")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["graph"].update(edit)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=words):
        load(directory)


def test_a_window_over_other_caches(made, tmp_path):
    directory = shutil.copytree(made[0], tmp_path / "copy")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["graph"]["states"][2]["shape"][1] = 4
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"caches of 'layers\.0' are no key, value and bias"):
        load(directory)
