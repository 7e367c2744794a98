"""The runtime on a real artifact: slots, buckets, sampling, text, and what it refuses."""

import json
import platform
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import baseline, ours
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from export import OnnxOptions, export_onnx
from runtime import ArtifactError, RequestError, load
from runtime.backends.ort_cpu import _move_apart
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import pieces, until
from wm_models import DogeForCausalLM, shipped_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runtime")
    ours(baseline(vocab_size=32768, eos_token_id=None), expert_routing="token").save_pretrained(root / "checkpoint")
    shipped_tokenizer().save_pretrained(root / "checkpoint")
    assert all(v.passed for v in export_onnx(root / "checkpoint", root / "artifact", OnnxOptions(max_batch=3)))
    return root / "artifact", DogeForCausalLM.from_pretrained(root / "checkpoint")


@pytest.fixture
def engine(made):
    return load(made[0])


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


@torch.no_grad()
def expected(model, row):
    return model(torch.as_tensor(row)[None]).logits[0, -1].numpy()


@pytest.mark.parametrize(("module", "more"), [("runtime", ("typer", "rich", "onnxruntime")), ("runtime.cli", ())])
def test_imports_nothing_heavy(module, more):
    heavy = ("torch", "transformers", "wm_models", "export", "onnx", *more)
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_graph_alone_takes_denormals_for_zero(made):
    """Also in a process's first session, in which ONNX Runtime would leave the calling thread so."""
    code = (
        "import sys\nimport numpy as np\nfrom runtime import load\n"
        "from runtime.host.denormals import flushed_denormals\n"
        "small = np.full(9, 1e-38, np.float32)\ntimes = lambda: bool((small * np.float32(0.1) > 0).all())\n"
        "found = [times()]\nwith flushed_denormals():\n    found.append(times())\n"
        "engine = load(sys.argv[1])\nfound.append(times())\nengine.prefill([[1, 2]])\nprint(*found, times())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, made[0]], capture_output=True, text=True, check=True)
    flushes = sys.platform == "linux" and platform.machine() == "x86_64"
    assert done.stdout.split() == ["True", str(not flushes), "True", "True"]


def test_ragged_slots_in_every_order(made, engine):
    """Appending, idling, growing over two buckets, and a chunk that is cut because its padding would not fit."""
    model, draw = made[1], np.random.default_rng(0)
    rows = [[], [], []]
    for new in ([200, 3, 0], [1, 1, 1], [0, 60, 9], [90, 0, 0], [1, 1, 1], [215, 2, 3], [1, 9, 0], [4, 1, 100]):
        ids = draw.integers(0, 32768, (3, max(new)))
        found = engine.prefill(ids, new).copy()
        for slot, length in enumerate(new):
            rows[slot].extend(ids[slot, :length].tolist())
            if length:
                np.testing.assert_allclose(found[slot], expected(model, rows[slot]), atol=2e-4)
    assert engine.lengths.tolist() == [512, 77, 114]
    with pytest.raises(RequestError, match="slot 0 would hold 513"):
        engine.decode([1, 1, 1])
    found = engine.prefill([[0], [7], [0]], [0, 1, 0])  # the full slot sits out
    np.testing.assert_allclose(found[1], expected(model, [*rows[1], 7]), atol=2e-4)


def test_caches_are_written_in_place(engine):
    """One buffer at both ends: its address stays, and a step changes the new token's row and no other."""
    engine.prefill([[5, 6, 7]])
    addresses = [cache.ctypes.data for cache in engine.session.caches]
    before = [cache.copy() for cache in engine.session.caches]
    engine.decode([9])
    assert [cache.ctypes.data for cache in engine.session.caches] == addresses
    for old, new in zip(before, engine.session.caches, strict=True):
        assert (old[:, :, 3] != new[:, :, 3]).any()
        old[:, :, 3] = new[:, :, 3]
        np.testing.assert_array_equal(old, new)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 5))
def test_rows_move_apart(heads, old, more):
    new = old + more
    flat = np.arange(1, heads * new + 1)
    expected = np.zeros((heads, new), flat.dtype)
    expected[:, :old] = flat[: heads * old].reshape(heads, old)
    _move_apart(flat, heads, old, new)
    np.testing.assert_array_equal(flat.reshape(heads, new), expected)


def test_onnx_runtime_says_nothing_of_copies(made):
    """It warns when a cache's output is not its input's buffer: heard where the two are apart, and only there."""
    code = """
import sys, onnxruntime
from runtime import load
from runtime.backends import ort_cpu as session
engine, held, bind = load(sys.argv[1]), [], session._bind

def apart(to, name, buffer, element):
    if name.endswith(".out"):
        held.append(buffer.copy())  # alive as long as it is bound
        buffer = held[-1]
    bind(to, name, buffer, element)

if sys.argv[2] == "apart":
    session._bind = apart
options = onnxruntime.SessionOptions()
options.log_severity_level = 2
path = engine.artifact.path / engine.graph.cpu_file
engine.session.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
engine.prefill([[1, 2, 3]])
"""
    heard = {}
    for mode in ("same", "apart"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, made[0], mode], capture_output=True, text=True, check=True
        )
        heard[mode] = "TensorScatter" in done.stderr
    assert heard == {"same": False, "apart": True}


def test_generate_is_greedy_transformers(made, engine):
    prompt = "def main():\n    "
    ids = shipped_tokenizer()(prompt, return_tensors="pt").input_ids
    new = made[1].generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert engine.generate_ids(ids[0].tolist(), 20) == new
    text = engine.generate(prompt, 20)
    assert text == "".join(engine.stream(prompt, 20))
    assert text == shipped_tokenizer().decode(new)
    assert engine.generate(prompt, 20, stop=text[3:6]) == text[: text.find(text[3:6])]
    assert engine.generate_ids(ids[0].tolist(), 20, stop_ids=[new[4]]) == new[: new.index(new[4])]


def test_a_prompt_up_to_the_capacity(engine):
    assert len(engine.generate_ids([1] * 510, 20)) == 3  # the last one needs no row
    assert len(engine.generate_ids([1] * 512, 20)) == 1
    with pytest.raises(RequestError, match=r"513 tokens.*capacity is 512"):
        engine.generate_ids([1] * 513, 20)


def test_an_idle_engine_does_not_spin(made):
    engine = load(made[0], threads=4)
    engine.generate_ids([1] * 64, 20)
    started = time.process_time()
    time.sleep(1)
    assert time.process_time() - started < 0.2  # one thread that spun would use 1 s of a processor, four of them 4


def test_what_is_wrong_with_weights_is_said_whatever_comes_of_them(copy, monkeypatch):
    """They are hashed while they are loaded, and the hash has the last word."""
    data = copy / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))

    def fail(*arguments):
        raise ArtifactError("ONNX Runtime refuses it")

    monkeypatch.setattr("runtime.backends.ort_cpu.OnnxSession", fail)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data: SHA-256"):
        load(copy)


def test_sampling_is_repeatable(engine):
    draws = [engine.generate_ids([1, 2], 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.3, 2.0),
    st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([1.0, 1.3, 0.8]),
)
def test_sampler_draws_from_transformers_distribution(seed, temperature, top_k, top_p, penalty):
    """The support and the shares of 2000 draws, against transformers' own processors."""
    draw = np.random.default_rng(seed)
    logits, seen = draw.normal(0, 2, (1, 40)).astype(np.float32), draw.integers(0, 40, 6)
    chain = LogitsProcessorList([processors.RepetitionPenaltyLogitsProcessor(penalty)])
    chain.append(processors.TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(processors.TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(processors.TopPLogitsWarper(top_p))
    shares = chain(torch.from_numpy(seen)[None], torch.from_numpy(logits)).softmax(-1)[0].numpy()
    sampler = Sampler(Sampling(temperature, top_k, top_p, penalty, seed))
    found = np.bincount([int(sampler(logits, [seen.tolist()])[0]) for _ in range(2000)], minlength=40) / 2000
    assert not found[shares == 0].any()
    assert np.abs(found - shares).max() < 0.06


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.1}, {"repetition_penalty": 0}, {"temperature": np.nan}]
)
def test_sampling_errors(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        Sampling(**options)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None)
def test_pieces_are_whole_characters(text):
    tokenizer = shipped_tokenizer().backend_tokenizer
    ids = tokenizer.encode(text).ids
    if tokenizer.decode(ids) == text:  # else the text spells a special token
        said = list(pieces(tokenizer, ids))
        assert "".join(said) == text
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in said) or "\N{REPLACEMENT CHARACTER}" in text


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stops_that_span_pieces(texts, stops):
    whole = "".join(texts)
    found = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    assert "".join(until(texts, stops)) == (whole[: min(found)] if found else whole)


@pytest.mark.parametrize(
    ("ids", "lengths", "words"),
    [
        ([[1, 40000]], None, "token id 40000 at position 1 of slot 0"),
        ([[1, -1]], None, "token id -1"),
        ([[0.5]], None, "expected integers"),
        ([1, 2], None, "shape"),
        ([[1, 2]], [3], "lengths"),
        ([[1]] * 4, None, "up to 3 slots"),
        ([[1] * 513], None, "513 tokens"),
    ],
)
def test_request_errors_leave_the_engine_as_it_was(engine, ids, lengths, words):
    with pytest.raises(RequestError, match=words):
        engine.prefill(ids, lengths)
    assert engine.lengths.size == 0
    with pytest.raises(RequestError, match="after a prefill"):
        engine.decode([1])


def test_a_language_model_has_no_labels(engine):
    assert engine.labels == ()
    for ask in (lambda: engine.classify("x"), lambda: engine.classify_each([[1]])):
        with pytest.raises(RequestError, match="is a language model, which has no labels; use generate"):
            ask()


def change_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=3), "schema 3.*upgrade"),
        (lambda m: m.pop("graph"), "graph is missing"),
        (lambda m: m.update(files=[]), "files is array; expected object"),
        (lambda m: m["graph"].update(max_batch="8"), "max_batch is str"),
        (lambda m: m["graph"].update(capacities=[]), "capacities"),
        (lambda m: m["graph"]["states"][0].update(shape=["batch", -1]), "shape"),
        (lambda m: m.update(verified=False), "verification"),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}), "outside"),
        (lambda m: m["files"]["model.onnx"].update(size=1), r"model\.onnx: has \d+ bytes; the manifest says 1"),
        (lambda m: m["files"]["model.onnx.data"].update(sha256="0" * 64), r"model\.onnx\.data: SHA-256"),
        (lambda m: m["graph"].update(file="other.onnx"), r"other\.onnx"),
    ],
)
def test_a_bad_manifest(copy, change, words):
    change_manifest(copy, change)
    with pytest.raises(ArtifactError, match=words):
        load(copy)


def test_a_bad_directory(copy, tmp_path):
    with pytest.raises(ArtifactError, match="no such directory"):
        load(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load(tmp_path)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="no JSON"):
        load(copy)
    with pytest.raises(RequestError, match=r"backend is 'cloud'; expected one of auto, .*cpu"):
        load(copy, backend="cloud")


def test_a_changed_byte_is_found(copy):
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data: SHA-256"):
        load(copy)


def test_without_a_tokenizer_ids_still_work(copy):
    (copy / "tokenizer.json").unlink()
    change_manifest(copy, lambda m: m["files"].pop("tokenizer.json"))
    engine = load(copy)
    with pytest.raises(RequestError, match=r"tokenizer\.json.*ids"):
        engine.generate("x")
    assert len(engine.generate_ids([1, 2], 4)) == 4
