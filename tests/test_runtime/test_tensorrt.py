"""The TensorRT backend over stand-ins for the driver and the execution context: what is bound, and in what order."""

import json
import shutil

import numpy as np
import pytest
from conftest import baseline, ours
from test_export.conftest import lowered

from export.targets.tensorrt import prepare_for_tensorrt
from runtime import ArtifactError, RequestError, load
from runtime.backends import cuda
from runtime.backends import tensorrt as backend
from test_runtime.standin import VERSION, Driver, Module, engine_bytes

CAPACITY, CHUNK, SLOTS = 48, 16, 3
PROFILES = [
    {"name": "decode", "batch": [1, 1, SLOTS], "sequence": [1, 1, 1]},
    {"name": "prefill", "batch": [1, 1, SLOTS], "sequence": [2, 8, CHUNK]},
]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request, tmp_path_factory):
    """An artifact whose "engine" is its specialised graph, for the stand-in; bounds as the builder would note them."""
    import onnx_ir as ir

    directory = tmp_path_factory.mktemp("made") / "artifact"
    model = ours(baseline(num_hidden_layers=2, eos_token_id=None), expert_routing="token")
    artifact = lowered(directory, model, request.param, max_batch=8, max_length=64)
    graph = ir.load(directory / artifact.graph.file)
    prepare_for_tensorrt(graph, artifact.graph, CAPACITY)
    ir.save(graph, directory / "standin.onnx", external_data=None)
    engine = engine_bytes(directory / "standin.onnx", PROFILES)
    (directory / "standin.onnx").unlink()
    (directory / "model.tensorrt-rtx.engine").write_bytes(engine)
    entry = {
        "file": "model.tensorrt-rtx.engine",
        "builder": "tensorrt-rtx",
        "version": VERSION,
        "compute_capabilities": ["8.0", "8.6", "8.9", "12.0"],
        "capacity": CAPACITY,
        "max_batch": SLOTS,
        "profiles": PROFILES,
        "aliased": [state.output for state in artifact.graph.states],
    }
    change(directory, lambda manifest: manifest.update(engines=[entry]), rehash="model.tensorrt-rtx.engine")
    return directory


def change(directory, edit, rehash=None):
    from runtime.artifact.integrity import file_hash

    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    if rehash:
        file = directory / rehash
        manifest["files"][rehash] = {"size": file.stat().st_size, "sha256": file_hash(file)}
    path.write_text(json.dumps(manifest))


@pytest.fixture
def machine(made, monkeypatch):
    """A GPU, its driver and TensorRT, all of them stand-ins; `machine.driver` and `machine.trt` record."""

    class Machine:
        driver = Driver()
        trt: Module

        def load(self, directory=made, **options):
            entry = json.loads((directory / "manifest.json").read_text())["engines"][0]
            aliases = {name: name.removesuffix(".out") for name in entry["aliased"]}
            self.trt = Module(self.driver, self.version, aliases)
            for name, value in self.settings.items():
                setattr(self.trt, name, value)
            return load(directory, **{"backend": "tensorrt", **options})

        version, settings = VERSION, {}

    machine = Machine()
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: machine.driver)
    monkeypatch.setattr(backend, "installed", lambda builder: True)
    monkeypatch.setattr(backend, "import_builder", lambda builder: machine.trt)
    return machine


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def tolerance(engine):
    return {"rtol": 0, "atol": 1e-5 if engine.graph.dtype == "float32" else 5e-3}


def test_it_computes_what_onnx_runtime_does(made, machine):
    """Ragged slots, idle ones, a prompt longer than a chunk, a full slot, and more slots after a reset."""
    engine, other = machine.load(), load(made, backend="cpu")
    draw = np.random.default_rng(0)
    for new in ([30, 3, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 9, 2], [15, 1, 1]):
        ids = draw.integers(0, 211, (3, max(new)))
        found, expected = engine.prefill(ids, new).copy(), other.prefill(ids, new)
        busy = np.array(new) > 0
        np.testing.assert_allclose(found[busy], expected[busy], **tolerance(engine))
    assert engine.lengths.tolist() == other.lengths.tolist() == [48, 17, 7]
    with pytest.raises(RequestError, match="slot 0 would hold 49 tokens"):
        engine.decode([1, 1, 1])
    with pytest.raises(RequestError, match="up to 3 slots"):
        machine.load().prefill([[1]] * 4)


def test_a_sequence_joins_beside_one_that_is_nearly_full(made, machine):
    """What is written for padding must not reach the rows that the other slot holds."""
    draw, first, second = np.random.default_rng(0), [], []
    engines = machine.load(), load(made, backend="cpu")
    prompts = draw.integers(0, 211, 40).tolist(), draw.integers(0, 211, 30).tolist()
    for engine, found in zip(engines, (first, second), strict=True):
        engine.reserve(3, CAPACITY)
        for slot, ids in zip((0, 2), prompts, strict=True):
            found.append(engine.join(slot, ids).copy())
        found += list(engine.append([[5], [0], [6]], [1, 0, 1])[[0, 2]].copy())
    np.testing.assert_allclose(first, second, **tolerance(engines[0]))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}])
def test_generation_is_the_same(made, machine, sampling):
    ids = machine.load().generate_ids([5, 6, 7], 30, **sampling)
    assert ids == load(made, backend="cpu").generate_ids([5, 6, 7], 30, **sampling)
    assert len(ids) == 30


def test_decode_is_captured_once_and_replayed(machine):
    engine = machine.load()
    engine.prefill([[1, 2, 3]])
    for token in range(5):
        engine.decode([token])
    assert machine.trt.events == [
        ("deserialize",),
        ("profile", 0),
        ("profile", 1),
        ("run", 1),
        ("run", 0),
        ("capture", 0),
    ]
    driver = machine.driver.calls
    assert driver.count("cuGraphLaunch") == 4
    assert (
        driver.index("cuStreamBeginCapture") < driver.index("cuStreamEndCapture") < driver.index("cuGraphInstantiate")
    )
    engine.reset()
    engine.prefill([[1, 2, 3]])  # as many slots, in the same buffers: the graph still stands
    engine.decode([4])
    assert machine.trt.events[6:] == [("run", 1)]
    engine.reset()
    engine.prefill([[1, 2], [3, 4]])
    engine.decode([5, 6])
    assert machine.trt.events[7:] == [("run", 1), ("run", 0)]
    assert "cuGraphExecDestroy" in driver


def test_an_engine_that_forbids_it_is_not_captured(machine):
    machine.settings = {"capturable": False}
    engine = machine.load()
    engine.prefill([[1, 2, 3]])
    for token in range(4):
        engine.decode([token])
    assert "cuStreamBeginCapture" not in machine.driver.calls
    assert machine.trt.events[-4:] == [("run", 0)] * 4


def test_greedy_decoding_copies_one_token_a_step(machine):
    """Up go the inputs, down comes the next id; a sampled token needs its row of logits."""
    engine, sizes = machine.load(), []
    download = engine.session.device.download
    engine.session.device.download = lambda array, address: (sizes.append(array.nbytes), download(array, address))
    list(engine.stream_ids([5, 6, 7], 2))
    assert sizes == [8, 8]
    list(engine.stream_ids([5, 6, 7], 1, temperature=1.0))
    assert sizes[2:] == [8, 211 * (4 if engine.graph.dtype == "float32" else 2)]


def test_caches_stay_where_they_are(machine):
    engine = machine.load()
    engine.prefill([[5, 6, 7]])
    before = dict(engine.session.addresses)
    for _ in range(4):
        engine.decode([9])
    assert engine.session.addresses == before
    assert sum(name.startswith("layers.") for name in before) == 6  # a cache and its output are one buffer


def test_a_state_that_is_not_in_place_is_copied(copy, machine):
    """As a recurrence's state is: the engine writes it elsewhere, and the next step must read what was written."""
    change(copy, lambda manifest: manifest["engines"][0]["aliased"].remove("layers.1.bias.out"))
    engine, other = machine.load(copy), load(copy, backend="cpu")
    for ids in ([[1, 2, 3]], [[4]], [[5]], [[6]]):
        found = engine.prefill(ids).copy()
        np.testing.assert_allclose(found, other.prefill(ids), **tolerance(engine))
    assert engine.session.addresses["layers.1.bias.out"] != engine.session.addresses["layers.1.bias"]


def test_all_memory_comes_back(machine):
    engine = machine.load()
    engine.prefill([[1, 2], [3, 4]])
    engine.session.close()
    assert machine.driver.used == 0


def test_out_of_memory(machine):
    machine.driver.total = 40_000
    engine = machine.load()
    used = machine.driver.used
    with pytest.raises(
        RequestError, match=r"out of GPU memory: layers\.\d\.\w+ for 3 slots of 48 tokens needs .* free on Stand-in"
    ):
        engine.prefill([[1]] * 3)
    assert machine.driver.used == used
    machine.driver.total = 1 << 30
    engine.prefill([[1]] * 3)


def test_not_finite_logits_are_told(made, machine):
    engine = machine.load()
    engine.prefill([[1, 2, 3]])
    session = engine.session
    broken = session.device.host_array((8,), np.float32)
    broken[:] = np.nan  # in float16 every other number is one
    session.device.upload(session.addresses["layers.0.value"], broken)
    assert session.step(np.array([[4]]), np.array([3]), np.array([1]), argmax=True).tolist() == [-1]


def test_profiles(machine):
    session = machine.load().session
    session.allocate(2, CAPACITY)
    assert [session.profile(length) for length in (1, 2, 16)] == [0, 1, 1]
    with pytest.raises(RequestError, match="no profile takes 2 slots of 17 tokens; the engine has decode"):
        session.profile(17)
    with pytest.raises(RequestError, match="up to 16 tokens"):
        session.step(np.zeros((2, 17), np.int64), np.zeros(2, np.int64), np.ones(2, np.int64))
    with pytest.raises(RequestError, match="up to 3 of 48"):
        session.allocate(4, CAPACITY)
    with pytest.raises(RequestError, match="fixed at 48"):
        session.grow(64)


def test_a_step_that_fails(machine):
    machine.settings = {"fails": True}
    with pytest.raises(RequestError, match="tensorrt-rtx failed to run a step"):
        machine.load().prefill([[1, 2]])


def test_another_version_is_never_deserialised(machine):
    machine.version = "1.8.0.1"
    with pytest.raises(
        RequestError, match=r"built by tensorrt-rtx 1\.7\.1\.116, and 1\.8.*wm-export tensorrt .* --max-length 48"
    ):
        machine.load()
    assert not machine.trt.events
    assert machine.load(backend="auto").session.graph.max_length == 64  # ONNX Runtime serves instead


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),
        ((9, 0), False),
        ((10, 0), False),
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_compute_capabilities(machine, capability, runs):
    machine.driver = Driver(capability=capability)
    if runs:
        machine.load()
        return
    number = ".".join(map(str, capability))
    # tensorrt-rtx builds for 7.5 where that is asked for, and never for an H100
    builds = r"; rebuild it: wm-export .*--builder tensorrt-rtx .*--compute-capability 7\.5$"
    never = r", for which tensorrt-rtx has no code; rebuild it: wm-export .*--builder tensorrt --max-batch 3 "
    words = rf"built for compute capability 8\.0, .*Stand-in GPU has {number}{builds if number == '7.5' else never}"
    with pytest.raises(ArtifactError, match=words):
        machine.load()
    assert not machine.trt.events


def test_a_damaged_engine_is_never_deserialised(copy, machine):
    path = copy / "model.tensorrt-rtx.engine"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"engine: SHA-256"):
        machine.load(copy)
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"engine: has \d+ bytes"):
        machine.load(copy)
    assert not machine.trt.events


def test_an_engine_that_does_not_load(machine):
    machine.settings = {"loads": False}
    with pytest.raises(ArtifactError, match="tensorrt-rtx does not load it: the plan file is corrupt"):
        machine.load()


def test_an_alias_that_the_manifest_denies(copy, machine):
    change(copy, lambda manifest: manifest["engines"][0]["aliased"].remove("layers.0.key.out"))
    machine.load(copy)
    aliases = {f"layers.{i}.{n}.out": f"layers.{i}.{n}" for i in range(2) for n in ("key", "value", "bias")}
    machine.settings = {"aliases": aliases}
    with pytest.raises(ArtifactError, match=r"layers\.0\.key\.out shares layers\.0\.key"):
        machine.load(copy)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda e: e.update(file="../x"), "not among the manifest's files"),
        (lambda e: e.update(builder="other"), "builder is 'other'"),
        (lambda e: e.update(compute_capabilities=["x"]), "compute_capabilities"),
        (lambda e: e.update(profiles=[]), "profiles has 0 entries"),
        (lambda e: e["profiles"][0].update(batch=[2, 1, 3]), "three rising sizes"),
        (lambda e: e.update(capacity=0), "capacity is 0"),
    ],
)
def test_a_bad_entry(copy, edit, words):
    change(copy, lambda manifest: edit(manifest["engines"][0]))
    with pytest.raises(ArtifactError, match=words):
        load(copy)


def test_what_is_missing_is_named(made, monkeypatch):
    with pytest.raises(RequestError, match=r"NVIDIA driver|cuda-python"):
        load(made, backend="tensorrt")
    monkeypatch.setattr(backend, "installed", lambda builder: False)
    with pytest.raises(
        RequestError,
        match=r"backend tensorrt: .*needs tensorrt-rtx; .* pip install 'wm-models\[tensorrt-rtx\]'",
    ):
        load(made, backend="tensorrt")
    load(made, backend="auto")

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda.importlib, "import_module", absent)
    with pytest.raises(RequestError, match=r"cuda-python is not installed.*wm-models\[tensorrt-rtx\]"):
        cuda.Device()
    assert cuda.gpu_count() == 0


def test_without_an_engine(made, copy):
    change(copy, lambda manifest: manifest.pop("engines"))
    with pytest.raises(RequestError, match="has no TensorRT engine; build one with wm-export tensorrt"):
        load(copy, backend="tensorrt")


def test_no_gpu_is_an_error_of_the_device(monkeypatch):
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: Driver(gpus=0))
    with pytest.raises(RequestError, match="GPU 0 is asked for; the driver shows 0"):
        cuda.Device()
