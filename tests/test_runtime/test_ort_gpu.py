"""ONNX Runtime's GPU providers: who is chosen, what is said where they cannot run, and what is bound on the device."""

import numpy as np
import onnxruntime
import pytest
from conftest import baseline, ours
from test_export.conftest import lowered

from runtime import RequestError, load
from runtime.artifact.integrity import read_artifact
from runtime.backends import cuda
from runtime.backends import ort_gpu as onnx_gpu
from runtime.backends.ort_cpu import OnnxSession
from runtime.backends.registry import choose_backend
from test_runtime.standin import Driver, OrtSession


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = ours(baseline(num_hidden_layers=2, eos_token_id=None), expert_routing="token")
    return lowered(tmp_path_factory.mktemp("made") / "artifact", model, max_batch=3, max_length=400).path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    model = ours(baseline(num_hidden_layers=1, num_labels=3))
    return lowered(tmp_path_factory.mktemp("classifier") / "artifact", model, max_batch=2, max_length=64).path


@pytest.fixture
def gpu_build(monkeypatch):
    """ONNX Runtime's build for GPUs, as far as it says so: the tests run with either."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*onnx_gpu.NAMES.values()])


@pytest.fixture
def gpu(monkeypatch, gpu_build):
    """A driver that shows a GPU."""
    driver = Driver()
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: driver)
    return driver


def test_only_who_leaves_it_open_gets_another(made, gpu_build):
    if cuda.gpu_count():
        pytest.skip("this machine has a GPU")
    assert choose_backend(read_artifact(made), "auto").name == "cpu"
    assert isinstance(load(made).session, OnnxSession)
    for backend in ("cuda", "ort-tensorrt"):
        with pytest.raises(RequestError, match=rf"backend {backend}: .*(NVIDIA driver|cuda-python).*backend auto"):
            load(made, backend)
    with pytest.raises(RequestError, match=r"backend is 'gpu'; expected one of auto, .*cuda, ort-tensorrt, cpu"):
        load(made, "gpu")


def test_what_is_missing_is_named(made, gpu, monkeypatch):
    def absent(path):
        raise OSError("libcublasLt.so.13: cannot open shared object file")

    artifact = read_artifact(made)
    monkeypatch.setattr(onnx_gpu.ctypes, "CDLL", absent)
    with pytest.raises(RequestError, match=r"needs a library that is not installed: libcublasLt\.so\.13"):
        choose_backend(artifact, "cuda")
    gpu.gpus = 0
    with pytest.raises(RequestError, match="driver shows no GPU"):
        choose_backend(artifact, "cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        RequestError,
        match=r"without TensorrtExecutionProvider; run pip uninstall onnxruntime, then pip install 'wm-models\[gpu\]'",
    ):
        choose_backend(artifact, "ort-tensorrt")


@pytest.fixture(params=["cuda", "ort-tensorrt"])
def on_gpu(request, gpu, monkeypatch):
    """`on_gpu(directory)`: its engine on a GPU backend."""

    def load_there(directory):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_gpu, "missing", lambda provider: None)
            patch.setattr(onnxruntime, "InferenceSession", OrtSession)
            return load(directory, request.param)

    return load_there


@pytest.fixture
def engine(made, on_gpu, monkeypatch):
    engine = on_gpu(made)
    monkeypatch.undo()
    return engine


def test_it_computes_on_the_device(made, engine):
    """Ragged slots, idle ones, and caches that grow where the provider lets them."""
    other, draw = load(made, "cpu"), np.random.default_rng(0)
    for new in ([30, 3, 0], [1, 1, 1], [0, 1, 1], [230, 9, 2], [1, 1, 1]):
        ids = draw.integers(0, 211, (3, max(new)))
        found, expected = engine.prefill(ids, new).copy(), other.prefill(ids, new)
        busy = np.array(new) > 0
        np.testing.assert_allclose(found[busy], expected[busy], atol=1e-5)
    assert engine.session.capacity == (400 if engine.session.graph.capacities == (400,) else 320)
    assert engine.generate_ids([3, 4], 9) == other.generate_ids([3, 4], 9)
    engine.session.close()
    assert engine.session.device.driver.used == 0


def test_a_classifier(classifier, on_gpu):
    """Its logits are as many as labels, on the device too."""
    texts = [np.arange(3, 3 + length) for length in (9, 1, 64)]
    engine = on_gpu(classifier)
    np.testing.assert_allclose(engine.classify(texts), load(classifier, "cpu").classify(texts), atol=1e-5)
    assert engine.session.host["logits"].size == 3  # one slot in the last batch


def test_a_provider_that_was_not_taken_is_an_error(made, gpu, monkeypatch):
    monkeypatch.setattr(onnx_gpu, "missing", lambda provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", OrtSession)
    monkeypatch.setattr(OrtSession, "get_providers", lambda session: ["CPUExecutionProvider"])
    with pytest.raises(RequestError, match="cuda: ONNX Runtime fell back to CPUExecutionProvider"):
        load(made, "cuda")


def test_the_tensorrt_providers_profile(engine):
    if engine.session.graph.capacities != (400,):
        pytest.skip("of the TensorRT provider alone")
    (name, options), *others = onnx_gpu.provider_options("tensorrt", engine.session.graph)
    assert [name, *(other for other, _ in others)] == [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
    ]  # fmt: skip
    assert options["trt_profile_min_shapes"].startswith(
        "input_ids:1x1,cache_lengths:1,sequence_lengths:1,logits_index:1x1,layers.0.key:1x2x400x16"
    )
    assert options["trt_profile_max_shapes"].startswith("input_ids:3x400,cache_lengths:3")
