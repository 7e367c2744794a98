"""Every backend keeps the Session protocol; a toy backend that is registered from outside the packages serves as well.

GPU backends run over stand-ins for the driver and the execution providers.
"""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from typer.testing import CliRunner

from export.targets.tensorrt import prepare_for_tensorrt
from runtime import RequestError, load
from runtime.artifact.integrity import file_hash, read_artifact
from runtime.backends import cuda, ort_gpu, tensorrt
from runtime.backends.base import Options
from runtime.backends.registry import BACKENDS, choose_backend
from runtime.cli import app
from test_runtime.standin import VERSION, Driver, Module, OrtSession, engine_bytes

SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"
VOCABULARY, LENGTH, SLOTS, CHUNK = 260, 192, 3, 16
ENTRY = {
    "file": "standin.engine",
    "builder": "tensorrt-rtx",
    "version": VERSION,
    "compute_capabilities": ["8.9"],
    "capacity": LENGTH,
    "max_batch": SLOTS,
    "profiles": [
        {"name": "decode", "batch": [1, 1, SLOTS], "sequence": [1, 1, 1]},
        {"name": "prefill", "batch": [1, 1, SLOTS], "sequence": [2, 8, CHUNK]},
    ],
}


class ToySession:
    """A session without a graph: the logits after a token are largest for the token that is larger by one."""

    device_name, most_rows = "Toy", 1

    def __init__(self, graph, threads):
        self.graph, self.chunk, self.threads = graph, 5, threads
        self.batch = self.capacity = 0
        self.seen = np.zeros(0, np.int64)  # (B,): the last token of each slot

    def allocate(self, batch, capacity):
        self.batch, self.capacity, self.seen = batch, capacity, np.zeros(batch, np.int64)

    def grow(self, capacity):
        self.capacity = capacity

    def shrink(self, capacity):
        self.capacity = capacity

    def clear_slot(self, slot):
        self.seen[slot] = 0

    def step(self, input_ids, cache_lengths, sequence_lengths, argmax=False):
        count = len(input_ids)
        for slot in np.flatnonzero(sequence_lengths):
            self.seen[slot] = input_ids[slot, sequence_lengths[slot] - 1]
        logits = -np.abs(np.arange(self.graph.logits_width) - self.seen[:count, None] - 1).astype(np.float32)
        return logits.argmax(-1) if argmax else logits

    def step_slot(self, slot, input_ids, cache_lengths, argmax=False):
        new = np.zeros(self.batch, np.int64)
        new[slot] = input_ids.size
        return self.step(np.tile(input_ids, (self.batch, 1)), cache_lengths, new, argmax)[slot : slot + 1]

    row_multiple = 1

    def copy_slot(self, source, target, tokens):
        self.seen[target] = self.seen[source]

    def read_rows(self, slot, start, stop):
        return [self.seen[slot : slot + 1].copy()]

    def write_rows(self, slot, start, rows):
        self.seen[slot] = rows[0][0]

    def close(self):
        self.batch = self.capacity = 0
        self.seen = np.zeros(0, np.int64)


class ToyBackend:
    name, has_devices, lacks = "toy", False, None

    def missing(self, artifact):
        return self.lacks

    def open(self, artifact, options):
        return ToySession(artifact.graph, options.threads)


@pytest.fixture
def toy(monkeypatch):
    backend = ToyBackend()
    monkeypatch.setitem(BACKENDS, "toy", backend)
    return backend


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The small artifact, with an "engine" for the stand-in: its graph at one capacity."""
    directory = tmp_path_factory.mktemp("made") / "artifact"
    shutil.copytree(SMALL, directory)
    contract = read_artifact(directory).graph
    states = contract.states
    graph = ir.load(directory / "model.onnx")
    prepare_for_tensorrt(graph, contract, contract.max_length)
    ir.save(graph, directory / "standin.onnx", external_data=None)
    made = engine_bytes(directory / "standin.onnx", ENTRY["profiles"])
    (directory / "standin.onnx").unlink()
    engine = directory / ENTRY["file"]
    engine.write_bytes(made)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["engines"] = [{**ENTRY, "aliased": [state.output for state in states]}]
    manifest["files"][engine.name] = {"size": engine.stat().st_size, "sha256": file_hash(engine)}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return read_artifact(directory)


@contextmanager
def two_gpus(monkeypatch, artifact, backend):
    """Within it a machine has two GPUs and all that `backend` needs there, stand-ins: their driver."""
    driver = Driver(gpus=2)
    aliases = {state.output: state.input for state in artifact.graph.states}
    with monkeypatch.context() as patch:
        patch.setattr(cuda.importlib, "import_module", lambda name: driver)
        if backend in ("cuda", "ort-tensorrt"):
            patch.setattr(ort_gpu, "missing", lambda provider: None)
            patch.setattr(onnxruntime, "InferenceSession", OrtSession)
        patch.setattr(tensorrt, "installed", lambda builder: True)
        patch.setattr(tensorrt, "import_builder", lambda builder: Module(driver, VERSION, aliases))
        yield driver


@pytest.fixture(params=[*BACKENDS, "toy"])
def opened(request, artifact, toy, monkeypatch):
    """A session of each backend, on this machine or over stand-ins."""
    with two_gpus(monkeypatch, artifact, request.param) as driver:
        backend = choose_backend(artifact, request.param)
        session = backend.open(artifact, Options(device=1 if backend.has_devices else 0))
    yield session
    session.close()
    assert backend.has_devices == any(driver.calls)
    if backend.has_devices:
        assert driver.used == 0, "close left memory behind"


class Slots:
    """A session's slots with their lengths; appends rows of any length, as the engine does."""

    def __init__(self, session, batch):
        self.session, self.lengths = session, np.zeros(batch, np.int64)
        session.allocate(batch, LENGTH)

    def append(self, *rows, argmax=False):
        """A row for each slot, maybe empty; the last logits of those that were not."""
        session, found = self.session, [None] * len(rows)
        for start in range(0, max(map(len, rows)), session.chunk):
            parts = [row[start : start + session.chunk] for row in rows]
            ids = np.zeros((len(rows), max(map(len, parts))), np.int64)
            for slot, part in enumerate(parts):
                ids[slot, : len(part)] = part
            need = int(self.lengths.max()) + ids.shape[1]
            if need > session.capacity:
                session.grow(next(size for size in session.graph.capacities if size >= need))
            new = np.array([len(part) for part in parts])
            made = session.step(ids, self.lengths, new, argmax)
            self.lengths[: len(rows)] += new
            found = [made[slot].copy() if part else found[slot] for slot, part in enumerate(parts)]
        return [each for each in found if each is not None]


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(3, 259, (4, 70)).tolist()


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_steps(opened, artifact, rows):
    """Logits of each slot's last real token, or the ids of the largest; a slot that gets nothing keeps its content."""
    slots = Slots(opened, 3)
    assert opened.batch == 3
    assert 0 < opened.capacity <= LENGTH
    assert 1 <= opened.chunk <= LENGTH
    assert isinstance(opened.device_name, str)
    first = slots.append(rows[0][:9], rows[1][:40], [])
    assert (first[0].shape, first[0].dtype) == ((VOCABULARY,), np.float32)
    both = slots.append([7], [8], [])
    ids = slots.append([9], [], rows[2], argmax=True)
    assert ids[0].dtype == np.int64
    alone = Slots(opened, 1)  # as many slots as are asked for, and empty
    same(alone.append([*rows[0][:9], 7]), both[:1])
    assert alone.append([9])[0].argmax() == ids[0]
    alone = Slots(opened, 1)
    assert alone.append(rows[2])[0].argmax() == ids[1]
    other = choose_backend(artifact, "cpu").open(artifact, Options())
    if opened.device_name != "Toy":
        same(Slots(other, 2).append(rows[0][:9], rows[1][:40]), first)


def test_one_slot(opened, rows):
    """`step_slot` begins a sequence where `clear_slot` ended one; the other slots do not notice."""
    slots = Slots(opened, 2)
    slots.append(rows[0][:30], rows[1][:5])
    opened.clear_slot(1)
    lengths = np.array([30, 0])
    for start in range(0, 12, opened.chunk):
        part = np.array(rows[2][start : start + opened.chunk][: 12 - start])
        found = opened.step_slot(1, part, lengths)[-1].copy()
        lengths[1] += part.size
    assert (found.shape, found.dtype) == ((VOCABULARY,), np.float32)
    ids = opened.step_slot(0, np.array([6]), lengths, argmax=True)
    assert (ids.shape, ids.dtype) == ((1,), np.int64)
    lengths[0] += 1
    slots.lengths = lengths
    after = slots.append([7], [8])
    alone = Slots(opened, 1)
    assert alone.append([*rows[0][:30], 6])[0].argmax() == ids[0]
    same([found], Slots(opened, 1).append(rows[2][:12]))
    same(after[:1], Slots(opened, 1).append([*rows[0][:30], 6, 7]))
    same(after[1:], Slots(opened, 1).append([*rows[2][:12], 8]))


def test_the_first_slots(opened, rows):
    """A step of two of three slots: the third keeps its content."""
    slots = Slots(opened, 3)
    slots.append(rows[0][:30], rows[1][:9], rows[2][:20])
    found = slots.session.step(np.array([[7], [8]]), slots.lengths, np.array([1, 0]))
    assert (found.shape, found.dtype) == ((2, VOCABULARY), np.float32)
    first = found[0].copy()
    ids = slots.session.step(np.array([[9]]), slots.lengths + np.array([1, 0, 0]), np.array([1]), argmax=True)
    slots.lengths[0] += 2
    after = slots.append([], [8], [9])
    alone = Slots(opened, 1)
    same([first], alone.append([*rows[0][:30], 7]))
    assert ids.tolist() == [alone.append([9])[0].argmax()]
    same(after[:1], Slots(opened, 1).append([*rows[1][:9], 8]))
    same(after[1:], Slots(opened, 1).append([*rows[2][:20], 9]))


def test_content_moves_between_slots(opened, rows):
    """A copied slot goes on like its source, also where rows were evicted, and so does one made of rows read before."""
    slots = Slots(opened, 3)
    slots.append(rows[0][:16])
    first = opened.read_rows(0, 0, 16)
    slots.append(rows[0][16:32])
    second = opened.read_rows(0, 16, 32)
    opened.copy_slot(0, 2, 32)
    opened.clear_slot(1)
    opened.write_rows(1, 0, first)
    opened.write_rows(1, 16, second)
    slots.lengths[:] = 32
    found = slots.append(*[rows[0][32:]] * 3)
    same(found, [found[0]] * 3)
    opened.copy_slot(1, 0, 70)
    same(slots.append([7], [7], [7]), Slots(opened, 1).append([*rows[0], 7]) * 3)
    if opened.graph.window is not None and opened.device_name != "Toy":
        assert Slots(opened, 1).append(rows[0])
        assert opened.read_rows(0, 64, 70) is None  # it has 40 rows


def test_a_smaller_capacity(opened, rows):
    """A slot goes on where it was when the longest one has ended."""
    slots = Slots(opened, 2)
    slots.append(rows[0][:20], rows[1] + rows[2])
    opened.clear_slot(1)
    slots.lengths[1] = 0
    opened.shrink(64)
    found = slots.append(rows[3], rows[2][:5])
    same(found[:1], Slots(opened, 1).append(rows[0][:20] + rows[3]))
    same(found[1:], Slots(opened, 1).append(rows[2][:5]))


def test_close(opened, rows):
    Slots(opened, 2).append(rows[0], rows[1])
    opened.close()
    opened.close()


def test_a_device_is_for_backends_that_have_several(artifact, toy, monkeypatch):
    for backend in ("cpu", "toy"):
        with pytest.raises(RequestError, match=f"device 0 is asked for, but backend {backend} has no devices"):
            load(artifact.path, backend, device=0)
    with pytest.raises(RequestError, match="device is -1; expected 0 or more"):
        load(artifact.path, device=-1)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: Driver(gpus=1))
    monkeypatch.setattr(ort_gpu, "missing", lambda provider: None)
    with pytest.raises(RequestError, match="GPU 3 is asked for; the driver shows 1"):
        load(artifact.path, "cuda", device=3)


@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if backend.has_devices])
def test_the_card_is_the_one_that_is_asked_for(artifact, monkeypatch, backend):
    """The first unless another is named; one that is not there is refused before memory is taken."""
    with two_gpus(monkeypatch, artifact, backend) as driver:
        for device in (None, 1):
            with load(artifact.path, backend, device=device) as engine:
                assert driver.chosen == engine.session.device.index == (device or 0)
                assert len(engine.generate_ids([5, 6, 7], 3)) == 3
        with pytest.raises(RequestError, match="GPU 2 is asked for; the driver shows 2"):
            load(artifact.path, backend, device=2)
        assert driver.used == 0
    graph = artifact.graph
    for provider in ort_gpu.NAMES:
        cards = [options for _, options in ort_gpu.provider_options(provider, graph, 1) if options]
        assert [options["device_id"] for options in cards] == ["1"] * len(cards)


def test_auto_takes_the_first_that_misses_nothing(artifact, toy, monkeypatch):
    order = list(BACKENDS)
    for name in order:
        monkeypatch.setitem(BACKENDS, name, ToyBackend())
    assert choose_backend(artifact) is BACKENDS["tensorrt"]
    BACKENDS["tensorrt"].lacks = BACKENDS["cuda"].lacks = "a screw is missing"
    assert choose_backend(artifact) is BACKENDS[order[2]]
    with pytest.raises(RequestError, match="backend cuda: a screw is missing; backend auto takes"):
        choose_backend(artifact, "cuda")
    for name in order:
        BACKENDS[name].lacks = f"{name} is not for sale"
    with pytest.raises(RequestError, match="no backend can run here: tensorrt: tensorrt is not for sale; cuda: "):
        choose_backend(artifact)


def test_without_onnx_runtime(artifact, toy, monkeypatch):
    """One line says what to install, and a backend that does not need it runs."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for backend in ("cpu", "cuda", "ort-tensorrt"):
        with pytest.raises(RequestError, match=r"ONNX Runtime is not installed; .*wm-models\[cpu\].*wm-models\[gpu\]"):
            load(artifact.path, backend)
    assert load(artifact.path, "toy").generate_ids([5], 2) == [6, 7]


def test_a_toy_backend_generates(artifact, toy):
    engine = load(artifact.path, backend="toy", threads=3)
    assert engine.session.threads == 3
    assert engine.generate_ids([5, 6, 7, 8, 9, 10, 11], 4) == [12, 13, 14, 15]
    assert engine.generate("a", 3) == "bcd"
    engine.reserve(2, 8)
    assert [int(engine.join(slot, [slot + 3]).argmax()) for slot in range(2)] == [4, 5]


def test_the_command_line_takes_a_toy_backend(artifact, toy):
    done = CliRunner().invoke(app, ["generate", str(artifact.path), "--prompt", "a", "--backend", "toy"])
    assert done.output.startswith("bcdefghij")
    done = CliRunner().invoke(app, ["generate", str(artifact.path), "--ids", "5", "--backend", "tou"])
    assert "expected one of auto, tensorrt, cuda, ort-tensorrt, cpu, toy" in str(done.exception)
