"""The portable graph on a GPU: ONNX Runtime's CUDA and TensorRT providers over buffers in the device's memory.

B batch, S new tokens, R rows of logits, C cache capacity.
"""

import ctypes
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifact.manifest import ELEMENTS, LOGITS_INDEX, Artifact, Graph
from runtime.backends.arrays import STORAGE
from runtime.backends.base import Options
from runtime.backends.cuda import Device, start_driver
from runtime.backends.gpu_session import ROWS, GpuSession
from runtime.backends.ort import MISSING, first_line, import_onnxruntime, open_session, session_options
from runtime.errors import ArtifactError, RequestError

NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
CHUNK = 512  # of the TensorRT provider, whose engine wants a largest step


def missing(provider: str) -> str | None:
    """What this machine lacks for a GPU provider, or None: its ONNX Runtime, the driver, a GPU, or a library."""
    try:
        onnxruntime = import_onnxruntime()
    except RequestError:
        return MISSING
    version = onnxruntime.__version__
    if NAMES[provider] not in onnxruntime.get_available_providers():
        install = "run pip uninstall onnxruntime, then pip install 'wm-models[gpu]'"
        return f"ONNX Runtime {version} is a build without {NAMES[provider]}; {install}"
    try:
        driver = start_driver()
    except RequestError as error:
        return str(error)
    result, count = driver.cuDeviceGetCount()
    if result != driver.CUresult.CUDA_SUCCESS or not count:
        return "the NVIDIA driver shows no GPU"
    onnxruntime.preload_dlls()
    library = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"ONNX Runtime {version} needs a library that is not installed: {error}"
    return None


def provider_options(provider: str, graph: Graph, device: int = 0) -> list[tuple[str, dict[str, str]]]:
    """The providers in the order in which they may take nodes, with their options, all on one card."""
    card = {"device_id": str(device)}
    options: list[tuple[str, dict[str, str]]] = [
        (NAMES["cuda"], {"use_tf32": "0", **card}), ("CPUExecutionProvider", {}),
    ]  # fmt: skip
    if provider == "tensorrt":
        bounds = {}
        for name, batch, length in (("min", 1, 1), ("opt", 1, 1), ("max", graph.max_batch, _chunk(graph))):
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(graph.inputs, (batch,)) | {"input_ids": (batch, length)}
            if graph.indexed:
                shapes[LOGITS_INDEX] = batch, min(length, ROWS, graph.most_rows)
            shapes |= {state.input: state.sized(batch, graph.rows(graph.max_length)) for state in graph.states}
            bounds[f"trt_profile_{name}_shapes"] = ",".join(
                f"{key}:{'x'.join(map(str, shape))}" for key, shape in shapes.items()
            )
        # One capacity, since TensorRT's cache update wants it fixed; engines are kept for the next time.
        kept = {
            "trt_engine_cache_enable": "1",
            "trt_timing_cache_enable": "1",
            "trt_engine_cache_path": str(Path.home() / ".cache" / "wm-models" / "tensorrt"),
        }
        options.insert(0, (NAMES["tensorrt"], {**bounds, **kept, **card}))
    return options


def _chunk(graph: Graph) -> int:
    return min(CHUNK, graph.chunk)


class CudaBackend:
    """ONNX Runtime with its CUDA provider."""

    name = "cuda"
    has_devices = True

    def missing(self, artifact: Artifact) -> str | None:
        return missing("cuda")

    def open(self, artifact: Artifact, options: Options) -> "OnnxGpuSession":
        return OnnxGpuSession(artifact, "cuda", Device(options.device), options.threads)


class OrtTensorRTBackend:
    """ONNX Runtime with its TensorRT provider, which builds its engines here, from the portable graph."""

    name = "ort-tensorrt"
    has_devices = True

    def missing(self, artifact: Artifact) -> str | None:
        return missing("tensorrt")

    def open(self, artifact: Artifact, options: Options) -> "OnnxGpuSession":
        return OnnxGpuSession(artifact, "tensorrt", Device(options.device), options.threads)


class OnnxGpuSession(GpuSession):
    """ONNX Runtime on a GPU: every input and output is bound to an address on the device, caches at both ends."""

    def __init__(self, artifact: Artifact, provider: str, device: Device, threads: int | None = None):
        graph = artifact.graph
        fixed = provider == "tensorrt"
        super().__init__(
            artifact, device, graph.max_batch, (graph.max_length,) if fixed else graph.capacities,
            _chunk(graph) if fixed else graph.chunk,
        )  # fmt: skip
        options = session_options(threads)
        if fixed:
            options.add_free_dimension_override_by_name("capacity", graph.rows(graph.max_length))
        path = artifact.path / graph.file
        try:
            # TensorRT's parser looks for weights beside the graph's own file
            model = str(path) if fixed else artifact.model(graph.file)
            self.session: Any = open_session(model, options, provider_options(provider, self.graph, device.index))
            artifact.folder.check_names([graph.file, *artifact.weights(graph.file)] if fixed else [])
        except Exception as error:  # ONNX Runtime's own exceptions share no narrower base
            raise ArtifactError(f"{path}: ONNX Runtime refuses it on {provider}: {first_line(error)}") from error
        if NAMES[provider] not in self.session.get_providers():
            raise RequestError(f"{provider}: ONNX Runtime fell back to {self.session.get_providers()[0]}")
        self._bindings: dict[tuple[int, int], Any] = {}

    def execute(self, length: int, rows: int) -> None:
        key = length, rows
        if key not in self._bindings:
            # those of decode and of verification are kept beside that of the latest chunk
            self._bindings = {held: binding for held, binding in self._bindings.items() if held[0] <= ROWS}
            self._bindings[key] = self._bind(*key)
        self.upload_inputs(length, rows)
        self.device.synchronize()  # ONNX Runtime has a stream of its own, and waits for it before it returns
        self.session.run_with_iobinding(self._bindings[key])

    def _bind(self, length: int, rows: int) -> Any:
        binding = self.session.io_binding()

        def bind(to: Any, name: str, dtype: str, shape: tuple[int, ...], address: int) -> None:
            to(name, "cuda", self.device.index, ELEMENTS[dtype], shape, address)

        for name, (shape, address) in zip(self.graph.inputs, self.input_bindings(length, rows), strict=True):
            bind(binding.bind_input, name, "int64", shape, address)
        given = length if self.graph.logits == "all" else rows
        logits = (self.batch, given, self.graph.logits_width)
        bind(binding.bind_output, "logits", self.graph.dtype, logits, self.addresses["logits"])
        for state in self.graph.states:
            shape = state.sized(self.batch, self.graph.rows(self.capacity))
            address = self.addresses[state.input]
            bind(binding.bind_input, state.input, state.dtype, shape, address)
            bind(binding.bind_output, state.output, state.dtype, shape, address)
        return binding

    def grow(self, capacity: int) -> None:
        """New caches, into which the old ones are copied row by row, on the device."""
        batch, old, before = self.batch, self.graph.rows(self.capacity), self.addresses
        rows = self.graph.rows(capacity)
        if rows == old:
            self.capacity = capacity
            return
        self.addresses = {}
        try:
            self.allocate(batch, capacity)
            for state in self.graph.states:
                small, large = state.sized(batch, old), state.sized(batch, rows)
                at = state.shape.index("capacity") if "capacity" in state.shape else 0
                width = np.dtype(STORAGE[state.dtype]).itemsize
                sizes = [prod(shape[at:]) * width for shape in (small, large)]
                for row in range(prod(small[:at])):
                    to, source = self.addresses[state.input] + row * sizes[1], before[state.input] + row * sizes[0]
                    self.device.copy(to, source, sizes[0])
            self.device.synchronize()
        finally:
            for address in before.values():
                self.device.free(address)

    def close(self) -> None:
        super().close()
        self.session = None

    def release(self) -> None:
        self._bindings = {}
        super().release()
