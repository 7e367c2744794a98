"""Stand-ins for CUDA's driver and for TensorRT, which record what they are asked and do it on the CPU.

Device memory is host memory under its own addresses. What goes on the stream waits there until the stream is
synchronised, as late as a GPU may do it; while a graph is being captured, it is kept until the graph is launched. An
"engine" is an ONNX file, which a context runs in ONNX Runtime over the buffers that were bound to it. So a step through
the stand-ins computes what the engine would, from the very addresses that it would read and write.
"""

import ctypes
import json
from collections import Counter
from enum import IntEnum
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

onnxruntime_session = onnxruntime.InferenceSession
InferenceSession = onnxruntime_session  # of engines and GPU providers; a test may put its own in its place
VERSION = "1.7.1.116"
CODES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """The part of `cuda.bindings.driver` that the runtime calls. `calls` has every call's name, in order."""

    CUresult = Result

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 75, 76

    class CUstream_flags:
        CU_STREAM_NON_BLOCKING = 1

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    def __init__(self, capability=(8, 9), memory=1 << 30, gpus=1, name="Stand-in GPU"):
        self.capability, self.total, self.gpus, self.name = capability, memory, gpus, name
        self.calls: list[str] = []
        self.blocks: dict[int, ctypes.Array] = {}
        self.capturing: list | None = None
        self.pending: list = []  # what is on the stream
        self.chosen: int | None = None  # the GPU that was asked for last

    def __getattribute__(self, name):
        if name.startswith("cu"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def put(self, work):
        """Put a piece of work on the stream, or into the graph that is being captured."""
        (self.pending if self.capturing is None else self.capturing).append(work)
        return (Result.CUDA_SUCCESS,)

    def finish(self):
        """Do what is on the stream."""
        work, self.pending = self.pending, []
        for each in work:
            each()

    def block(self, address, size):
        """Refuse an access outside what was allocated."""
        for start, memory in self.blocks.items():
            if start <= address and address + size <= start + len(memory):
                return address
        raise AssertionError(f"{size} bytes at {address:#x} were never allocated")

    def cuInit(self, flags):
        return (Result.CUDA_SUCCESS,)

    def cuDriverGetVersion(self):
        return Result.CUDA_SUCCESS, 13020

    def cuDeviceGetCount(self):
        return Result.CUDA_SUCCESS, self.gpus

    def cuDeviceGet(self, index):
        self.chosen = index
        return Result.CUDA_SUCCESS, index

    def cuDevicePrimaryCtxRetain(self, device):
        return Result.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context):
        return (Result.CUDA_SUCCESS,)

    def cuDeviceGetName(self, length, device):
        return Result.CUDA_SUCCESS, self.name.encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute, device):
        return Result.CUDA_SUCCESS, self.capability[attribute - 75]

    def cuStreamCreate(self, flags):
        return Result.CUDA_SUCCESS, 7

    def cuMemGetInfo(self):
        return Result.CUDA_SUCCESS, self.total - self.used, self.total

    @property
    def used(self):
        return sum(len(memory) for memory in self.blocks.values())

    def cuMemAlloc(self, size):
        if self.used + size > self.total:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = (ctypes.c_char * size)()
        ctypes.memset(memory, 0xFF, size)  # NaN in every float: nothing may be read before it is written
        self.blocks[ctypes.addressof(memory)] = memory
        return Result.CUDA_SUCCESS, ctypes.addressof(memory)

    cuMemAllocHost = cuMemAlloc

    def cuMemFree(self, address):
        self.finish()  # CUDA waits for the device too
        del self.blocks[address]
        return (Result.CUDA_SUCCESS,)

    cuMemFreeHost = cuMemFree

    def cuMemsetD8Async(self, address, value, size, stream):
        return self.put(lambda: ctypes.memset(self.block(address, size), value, size))

    def cuMemcpyHtoDAsync(self, to, address, size, stream):
        return self.put(lambda: ctypes.memmove(self.block(to, size), self.block(address, size), size))

    cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = cuMemcpyHtoDAsync

    def cuStreamSynchronize(self, stream):
        assert self.capturing is None, "a capture must not wait for the stream"
        self.finish()
        return (Result.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (Result.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return Result.CUDA_SUCCESS, graph

    def cuGraphInstantiate(self, graph, flags):
        return Result.CUDA_SUCCESS, list(graph)

    def cuGraphDestroy(self, graph):
        return (Result.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, graph):
        graph.clear()
        return (Result.CUDA_SUCCESS,)

    def cuGraphLaunch(self, graph, stream):
        assert graph, "the graph was destroyed"
        self.pending += graph
        return (Result.CUDA_SUCCESS,)

    def cuGetErrorString(self, error):
        return Result.CUDA_SUCCESS, error.name.encode()


class Context:
    """An execution context: shapes and addresses by name, and one profile."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.profile = self.memory = None

    def set_optimization_profile_async(self, index, stream):
        self.engine.record("profile", index)
        self.profile = index
        return True

    def set_device_memory(self, address, size):
        self.memory = self.engine.driver.block(address, size)

    def is_stream_capturable(self, stream):
        return self.engine.capturable

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.engine.within(name, shape, self.profile)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.engine.kinds

    def execute_async_v3(self, stream):
        assert stream == 7
        assert self.memory is not None
        assert self.addresses.keys() == self.engine.kinds.keys(), "a tensor has no buffer"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        for output, source in self.engine.aliases.items():
            assert addresses[output] == addresses[source], f"{output} is not in place"
        self.engine.record("run" if self.engine.driver.capturing is None else "capture", self.profile)
        self.engine.driver.put(lambda: self.engine.run(shapes, addresses))
        return not self.engine.fails


class Engine:
    """What `engine_bytes` made, run in ONNX Runtime."""

    def __init__(self, data, module):
        self.driver, self.events = module.driver, module.events
        self.capturable, self.fails = module.capturable, module.fails
        self.session = InferenceSession(data)
        notes = self.session.get_modelmeta().custom_metadata_map
        self.bounds = json.loads(notes["profiles"])
        self.aliases = json.loads(notes["aliases"]) if module.aliases is None else module.aliases
        self.kinds = {v.name: v.type for v in [*self.session.get_inputs(), *self.session.get_outputs()]}

    def record(self, *event):
        self.events.append(event)

    def within(self, name, shape, profile):
        bounds = self.bounds[profile]
        fits = bounds["batch"][0] <= shape[0] <= bounds["batch"][2]
        if name == "input_ids":
            fits = fits and bounds["sequence"][0] <= shape[1] <= bounds["sequence"][2]
        return fits

    def view(self, name, shape, addresses):
        kind = CODES[self.kinds[name]]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        address = self.driver.block(addresses[name], size)
        return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)

    def run(self, shapes, addresses):
        feed = {name: self.view(name, shape, addresses).copy() for name, shape in shapes.items()}
        names = [value.name for value in self.session.get_outputs()]
        for name, found in zip(names, self.session.run(names, feed), strict=True):
            self.view(name, found.shape, addresses)[...] = found

    def get_aliased_input_tensor(self, name):
        return self.aliases.get(name)

    def get_device_memory_size_for_profile_v2(self, index):
        return 1000 * (index + 1)

    def create_runtime_config(self):
        class Config:
            def set_execution_context_allocation_strategy(self, strategy):
                assert strategy == "user managed"

        return Config()

    def create_execution_context(self, config):
        return Context(self)


class Module:
    """`tensorrt_rtx`, as far as the runtime uses it. `events` records profiles, runs and captures.

    `aliases`: the outputs that its engines write in place, with their inputs; None for those that the engine notes.
    """

    __spec__ = object()  # it is installed

    class ILogger:
        class Severity(IntEnum):
            ERROR = 1

        def __init__(self):
            pass

    class ComputeCapability(IntEnum):
        NONE, SM75, SM80, SM86, SM89, SM120, SM121 = 0, 75, 80, 86, 89, 120, 121

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "eager"

    def __init__(self, driver, version=VERSION, aliases=None):
        self.driver, self.aliases, self.__version__ = driver, aliases, version
        self.events: list[tuple] = []
        self.capturable, self.fails, self.loads = True, False, True

    def Runtime(self, logger):
        module = self

        class Runtime:
            def deserialize_cuda_engine(self, data):
                module.events.append(("deserialize",))
                if not module.loads:
                    logger.log(logger.Severity.ERROR, "the plan file\n is corrupt")
                    return None
                return Engine(data, module)

        return Runtime()


def engine_bytes(model, profiles):
    """The engine of the ONNX file `model`, rewritten for TensorRT: its caches are in place."""
    whole = onnx.load(model)
    scatters = [node for node in whole.graph.node if node.op_type == "TensorScatter"]
    aliases = {node.output[0]: node.input[0] for node in scatters}
    for name, value in (("profiles", profiles), ("aliases", aliases)):
        whole.metadata_props.add(key=name, value=json.dumps(value))
    return whole.SerializeToString()


def run_builder(order, builder, modules, progress):
    """What `export.targets.tensorrt_builder.run_builder` does: every operator becomes its layer, and all are fused."""
    profiles = [options[0] for options in order["profiles"]]
    engine = engine_bytes(order["model"], profiles)
    Path(order["engine"]).write_bytes(engine)
    Path(order["log"]).write_text("INFO: a stand-in\n")
    nodes = onnx.load(order["model"], load_external_data=False).graph.node
    kinds = ("TensorScatter", "Attention", "DequantizeLinear")
    named = {kind: [node for node in nodes if node.op_type == kind] for kind in kinds}
    return {
        "version": VERSION,
        "profiles": profiles,
        "counts": dict(Counter(node.op_type for node in nodes).most_common()),
        "attention": [{"name": node.name, "fused": [True] * len(profiles)} for node in named["Attention"]],
        "caches": [
            {"name": node.name, "input": node.input[0], "output": node.output[0]} for node in named["TensorScatter"]
        ],
        "quantised": [{"name": node.name, "type": "INT8"} for node in named["DequantizeLinear"]],
        "rotary": [node.name for node in nodes if node.op_type == "RotaryEmbedding"],
        "bytes": len(engine),
        "seconds": 0.0,
        "peak_bytes": 0,
    }


class OrtSession:
    """`onnxruntime.InferenceSession` on the stand-in's memory, which CUDA's provider would call its own.

    It does not wait for the driver's stream: ONNX Runtime has one of its own.
    """

    def __init__(self, path, options, providers, enable_fallback):
        self.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.providers = [name for name, _ in providers]

    def get_providers(self):
        return self.providers

    def io_binding(self):
        binding = self.session.io_binding()

        class Binding:
            def bind_input(self, name, device, *rest):
                assert device == "cuda"
                binding.bind_input(name, "cpu", *rest)

            def bind_output(self, name, device, *rest):
                assert device == "cuda"
                binding.bind_output(name, "cpu", *rest)

            held = binding

        return Binding()

    def run_with_iobinding(self, binding):
        self.session.run_with_iobinding(binding.held)


def open_session(path, options=None, providers=(), **rest):
    """`onnxruntime.InferenceSession` where some sessions are for a GPU, and some for the CPU."""
    if any(provider[0] == "CUDAExecutionProvider" for provider in providers):
        return OrtSession(path, options, providers, **rest)
    return onnxruntime_session(path, options, providers=providers, **rest)


__all__ = ["VERSION", "Driver", "Module", "OrtSession", "engine_bytes", "open_session", "run_builder"]
