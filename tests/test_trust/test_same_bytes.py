"""What was checked is what is used, whoever changes the directory meanwhile."""

import os
import shutil
import threading
import time

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from export.package.signing import sign
from runtime import ArtifactError, load
from runtime.artifact.folder import Folder
from runtime.artifact.integrity import open_artifact, read_artifact
from test_trust.samples import rewrite

IDS = [[5, 6, 7, 8]]


@pytest.fixture
def keys(tmp_path):
    private = Ed25519PrivateKey.generate()
    path = tmp_path / "key.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path, private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def pair(artifact, tmp_path):
    """Two artifacts of one graph with other weights, each right by its manifest."""
    made = [shutil.copytree(artifact, tmp_path / name) for name in ("first", "second")]
    weights = np.fromfile(made[1] / "model.onnx.data", np.float32)
    (weights * np.float32(1.5)).tofile(made[1] / "model.onnx.data")
    rewrite(made[1])
    return made


def exchange(one, other, aside):
    os.rename(one, aside)
    os.rename(other, one)
    os.rename(aside, other)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_directories_swapped_during_loads(pair, tmp_path, keys, signed):
    """Every load that succeeds has the weights of the manifest that it read; without the swaps both outcomes differ."""
    private, public = keys
    options = {"public_key": public} if signed else {}
    for directory in pair if signed else ():
        sign(directory, private)
    expected = {read_artifact(path).manifest: load(path).prefill(IDS).copy() for path in pair}
    assert len({logits.tobytes() for logits in expected.values()}) == 2
    stop = threading.Event()

    def swap():
        while not stop.wait(0.02):
            exchange(*pair, tmp_path / "aside")

    thread = threading.Thread(target=swap)
    thread.start()
    loaded = []
    try:
        for _ in range(25):
            try:
                engine = load(pair[0], **options)
            except ArtifactError:
                continue  # between two renamings there is no such directory
            loaded.append(engine.artifact.manifest)
            np.testing.assert_array_equal(engine.prefill(IDS), expected[engine.artifact.manifest])
    finally:
        stop.set()
        thread.join()
    assert len(loaded) > 10


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "config.json"])
def test_a_file_that_is_renamed_over_is_not_read(pair, tmp_path, name):
    """After the check, another file takes the name of one that was checked: what was checked is used, or refused."""
    expected = load(pair[0]).prefill(IDS).copy()
    from runtime.backends.ort_cpu import OnnxSession
    from runtime.engine import Engine

    artifact = read_artifact(pair[0])
    os.rename(pair[0] / name, tmp_path / "checked")
    (pair[0] / name).write_bytes(b"\0" * (tmp_path / "checked").stat().st_size)
    np.testing.assert_array_equal(Engine(artifact, OnnxSession(artifact)).prefill(IDS), expected)


@pytest.mark.parametrize("when", ["before the graph is loaded", "after it was"])
def test_a_file_that_is_overwritten_during_a_load_is_refused(copy, when):
    """Also with the same bytes, and where its time of change is set back."""
    path = copy / "model.onnx.data"
    data, times = path.read_bytes(), path.stat()

    def overwrite():
        with open_artifact(copy):
            time.sleep(0.1 if when == "after it was" else 0)
            with path.open("r+b") as stream:
                stream.write(data if when == "after it was" else bytes(len(data)))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(ArtifactError, match=r"model.onnx.data: (SHA-256|was changed or replaced while it was loaded)"):
        overwrite()


def test_every_file_is_opened_once(artifact, monkeypatch):
    opened, inner = [], os.open

    def note(path, *args, dir_fd=None, **kwargs):
        if dir_fd is not None:
            opened.append(os.fspath(path))
        return inner(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened by its path"))
    files = set(read_artifact(artifact).files)
    assert sorted(opened) == sorted({*files, "manifest.json"})


def test_descriptors_are_given_back(artifact):
    load(artifact)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load(artifact)
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_weights_of_a_gpu_s_parser_lie_where_they_were_checked(pair, tmp_path):
    """TensorRT's parser opens them by their names, which are compared with the opened files afterwards."""
    folder = Folder(pair[0])
    folder.read("model.onnx.data")
    folder.check_names(["model.onnx.data"])
    exchange(*pair, tmp_path / "aside")
    with pytest.raises(ArtifactError, match="was changed or replaced"):
        folder.check_names(["model.onnx.data"])


def test_the_graph_finds_its_weights_below_the_root(artifact):
    found = read_artifact(artifact)
    model = onnx.load_from_string(found.model("model.onnx"))
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    (place,) = places
    assert place == found.folder.link("model.onnx.data").lstrip("/")
