"""The TensorRT backend: an engine with a profile for decode and one for prefill, its caches in place on the GPU.

B batch, S new tokens, C cache capacity.
"""

from dataclasses import replace
from typing import Any

from runtime.artifact.manifest import NEXT_IDS, Artifact
from runtime.backends.base import Options
from runtime.backends.cuda import Device, gpu_count, start_driver
from runtime.backends.gpu_session import GpuSession
from runtime.backends.tensorrt_editions import how_to_install, import_builder, installed, later_than, rtx_capabilities
from runtime.backends.tensorrt_entry import EngineFile, engine_entries
from runtime.errors import ArtifactError, RequestError


def choose_engine(artifact: Artifact) -> EngineFile:
    """The first engine that this machine's TensorRT can run; its GPU is looked at when it is loaded.

    Raises `ArtifactError` where there is none, for the last one's reason.
    """
    reason = (
        f"{artifact.path}: has no TensorRT engine; build one with "
        f"wm-export tensorrt {artifact.path} --out {artifact.path} --force"
    )
    for engine in engine_entries(artifact):
        if not installed(engine.builder):
            reason = f"{artifact.path / engine.file}: needs {engine.builder}; {how_to_install(engine.builder)}"
        elif (version := import_builder(engine.builder).__version__) != engine.version:
            reason = (
                f"{artifact.path / engine.file}: was built by {engine.builder} {engine.version}, and {version} is "
                f"installed; rebuild it: {rebuild(artifact, engine)}"
            )
        else:
            return engine
    raise ArtifactError(reason)


class TensorRTBackend:
    """An engine that is in the artifact, for the release of TensorRT that is installed."""

    name = "tensorrt"
    has_devices = True

    def missing(self, artifact: Artifact) -> str | None:
        engine_entries(artifact)  # entries that are damaged are an error, whatever runs
        try:
            choose_engine(artifact)
            start_driver()
        except (ArtifactError, RequestError) as error:
            return str(error)
        return None if gpu_count() else "the NVIDIA driver shows no GPU"

    def open(self, artifact: Artifact, options: Options) -> "TensorRTSession":
        return TensorRTSession(artifact, choose_engine(artifact), Device(options.device))


def rebuild(artifact: Artifact, engine: EngineFile, builder: str | None = None) -> str:
    """The command that builds the engine again, with another `builder` where one is named."""
    return (
        f"wm-export tensorrt {artifact.path} --out {artifact.path} --force --builder {builder or engine.builder} "
        f"--max-batch {engine.max_batch} --max-length {engine.capacity}"
    )


def runs_on(engine: EngineFile, capability: str) -> bool:
    """Whether the engine has code for a GPU of this compute capability: named, or later than all that are named."""
    if engine.builder == "tensorrt" or capability in engine.compute_capabilities:
        return capability in engine.compute_capabilities
    return later_than(capability, engine.compute_capabilities)


def _not_for(artifact: Artifact, engine: EngineFile, device: Device, trt: Any) -> str:
    """Why the engine does not run on this GPU, and the command that makes one that does."""
    words = (
        f"{artifact.path / engine.file}: was built for compute capability {', '.join(engine.compute_capabilities)}, "
        f"and {device.name} has {device.capability}"
    )
    if engine.builder == "tensorrt":
        return f"{words}; rebuild it: {rebuild(artifact, engine)}"
    if device.capability in rtx_capabilities(trt):
        return f"{words}; rebuild it: {rebuild(artifact, engine)} --compute-capability {device.capability}"
    return f"{words}, for which {engine.builder} has no code; rebuild it: {rebuild(artifact, engine, 'tensorrt')}"


class TensorRTSession(GpuSession):
    """A loaded engine. Its capacity is the engine's and never grows.

    Each profile has an execution context of its own, and both share one workspace, since they never run at once. A
    decode step is captured as a CUDA graph the second time it runs for a number of slots, and replayed from then on.
    """

    has_next_ids = True

    def __init__(self, artifact: Artifact, engine: EngineFile, device: Device):
        chunk = max(profile.sequence[2] for profile in engine.profiles)
        # an engine chooses the last token itself: no input of it names others
        portable = replace(artifact, graph=replace(artifact.graph, indexed=False))
        super().__init__(portable, device, engine.max_batch, (engine.capacity,), chunk)
        self.file, path = engine, artifact.path / engine.file
        self.trt: Any = import_builder(engine.builder)
        if not runs_on(engine, device.capability):
            raise ArtifactError(_not_for(artifact, engine, device, self.trt))
        self.words: list[str] = []
        self.logger = _logger(self.trt, self.words)
        self.runtime = self.trt.Runtime(self.logger)
        self.engine: Any = self.runtime.deserialize_cuda_engine(artifact.folder.read(engine.file))
        if self.engine is None:
            raise ArtifactError(f"{path}: {engine.builder} does not load it: {self._said()}")
        for state in self.graph.states:
            aliased = self.engine.get_aliased_input_tensor(state.output)
            if (aliased == state.input) != (state.output in engine.aliased):
                raise ArtifactError(f"{path}: {state.output} shares {aliased}, which is not what the manifest says")
        self.copied = [state for state in self.graph.states if state.output not in engine.aliased]
        sizes = [self.engine.get_device_memory_size_for_profile_v2(index) for index in range(len(engine.profiles))]
        self.workspace = device.allocate(max(sizes), "the engine's workspace")
        self.contexts = [self._context(index, size) for index, size in enumerate(sizes)]
        device.synchronize()
        self._bound: dict[int, int] = {}  # a context's index, and the S that it is set up for
        self._graphs: dict[int, Any] = {}  # S = 1 alone: None after its first run

    def _context(self, index: int, size: int) -> Any:
        """An execution context on profile `index`, in the shared workspace."""
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:  # tensorrt-rtx alone: what is captured should be the final kernels
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        context = self.engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(index, self.device.stream):
            raise RequestError(f"{self.file.builder} makes no execution context for profile {index}: {self._said()}")
        context.set_device_memory(self.workspace, size)
        return context

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        own = {state.output: self.state_bytes(state, batch, capacity) for state in self.copied}
        return {**super().sizes(batch, capacity), **own}

    def profile(self, length: int) -> int:
        """The index of the first profile that takes S = `length` tokens for every slot."""
        for index, profile in enumerate(self.file.profiles):
            if _within(length, profile.sequence) and _within(self.batch, profile.batch):
                return index
        ranges = "; ".join(f"{p.name}: {p.batch} slots, {p.sequence} tokens" for p in self.file.profiles)
        raise RequestError(f"no profile takes {self.batch} slots of {length} tokens; the engine has {ranges}")

    def execute(self, length: int, rows: int) -> None:
        index = self.profile(length)
        context = self.contexts[index]
        if self._bound.get(index) != length:
            self._bind(context, length)
            self._bound[index] = length
        if length > 1:
            self._enqueue(context, length)
            return
        graph = self._graphs.get(length)
        if graph is None and length in self._graphs and self._capturable(context):
            with self.device.capture() as held:
                self._enqueue(context, length)
            graph = held[0]
        if graph is None:
            self._enqueue(context, length)
        else:
            self.device.launch(graph)
        self._graphs[length] = graph

    def _capturable(self, context: Any) -> bool:
        """Whether the engine allows its step to be captured; where it cannot be asked, it does."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or ask(self.device.stream)

    def _bind(self, context: Any, length: int) -> None:
        """Set the shape and address of everything that a step of S = `length` tokens reads and writes."""
        for name, (shape, address) in zip(self.graph.inputs, self.input_bindings(length, 1), strict=True):
            self._set(context, name, address, shape)
        for state in self.graph.states:
            shape = state.sized(self.batch, self.graph.rows(self.capacity))
            self._set(context, state.input, self.addresses[state.input], shape)
            self._set(context, state.output, self.addresses.get(state.output, self.addresses[state.input]))
        for name in ("logits", NEXT_IDS):
            self._set(context, name, self.addresses[name])

    def _set(self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        if shape is not None and not context.set_input_shape(name, shape):
            raise RequestError(f"{self.file.builder} refuses the shape {shape} of {name}: {self._said()}")
        if not context.set_tensor_address(name, address):
            raise RequestError(f"{self.file.builder} refuses the buffer of {name}: {self._said()}")

    def _enqueue(self, context: Any, length: int) -> None:
        self.upload_inputs(length, 1)
        if not context.execute_async_v3(self.device.stream):
            raise RequestError(f"{self.file.builder} failed to run a step: {self._said()}")
        for state in self.copied:  # its output is a buffer of its own; the next step reads the input's
            size = self.state_bytes(state, self.batch, self.capacity)
            self.device.copy(self.addresses[state.input], self.addresses[state.output], size)
        rows = length if self.graph.logits == "all" else 1
        self.device.download(self.host["next_ids"][: self.batch * rows], self.addresses[NEXT_IDS])

    def grow(self, capacity: int) -> None:
        raise RequestError(f"a capacity of {capacity} is asked for; this engine's is fixed at {self.capacity}")

    def release(self) -> None:
        for graph in self._graphs.values() if self.addresses else ():
            if graph is not None:
                self.device.forget(graph)
        self._graphs, self._bound = {}, {}
        super().release()

    def close(self) -> None:
        """Give all memory back; the session cannot be used again."""
        self.release()
        if self.workspace:
            self.device.free(self.workspace)
        self.contexts, self.engine, self.workspace = [], None, 0

    def _said(self) -> str:
        return "; ".join(" ".join(words.split()) for words in self.words[-3:]) or "it gives no reason"


def _within(value: int, bounds: tuple[int, int, int]) -> bool:
    return bounds[0] <= value <= bounds[2]


def _logger(trt: Any, words: list[str]) -> Any:
    class Logger(trt.ILogger):
        """Keeps the errors, for the message of the exception that follows them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                words.append(message)

    return Logger()
