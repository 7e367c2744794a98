"""One GPU through CUDA's driver: memory, copies, a stream, and captured graphs. Imported only where it is used."""

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.errors import RequestError

EXTRA = "pip install 'wm-models[tensorrt-rtx]' or 'wm-models[tensorrt]'"


def gpu_count() -> int:
    """How many GPUs CUDA sees: 0 without a driver, and without cuda-python."""
    try:
        driver = start_driver()
        return int(_check(driver, "cuDeviceGetCount", driver.cuDeviceGetCount()))
    except RequestError:
        return 0


def start_driver() -> Any:
    """cuda-python's driver module, initialised. Raises `RequestError` where it or the driver is missing."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as error:
        raise RequestError(f"cuda-python is not installed, and a GPU needs it; install it with {EXTRA}") from error
    try:
        result = driver.cuInit(0)
    except Exception as error:  # its loader has exceptions of its own for a driver that is not there
        words = " ".join(str(error).split())
        raise RequestError(f"this machine has no NVIDIA driver, and a GPU needs one: {words}") from error
    _check(driver, "cuInit", result)
    return driver


class Device:
    """The GPU `index`, its primary context current, and one stream, on which all copies and launches go.

    Addresses are integers. Raises `RequestError` where there is no cuda-python, driver or GPU, and where memory is
    short, with what was asked and what is free.
    """

    def __init__(self, index: int = 0):
        self.index = index
        self.driver: Any = start_driver()
        count = int(self._call("cuDeviceGetCount", self.driver.cuDeviceGetCount()))
        if not 0 <= index < count:
            raise RequestError(f"GPU {index} is asked for; the driver shows {count}")
        self.device = self._call("cuDeviceGet", self.driver.cuDeviceGet(index))
        self.context = self._call("cuDevicePrimaryCtxRetain", self.driver.cuDevicePrimaryCtxRetain(self.device))
        self._call("cuCtxSetCurrent", self.driver.cuCtxSetCurrent(self.context))
        name = self._call("cuDeviceGetName", self.driver.cuDeviceGetName(256, self.device))
        self.name = name.split(b"\0")[0].decode()
        attribute = self.driver.CUdevice_attribute
        self.capability = ".".join(
            str(self._call("cuDeviceGetAttribute", self.driver.cuDeviceGetAttribute(which, self.device)))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        flags = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._call("cuStreamCreate", self.driver.cuStreamCreate(flags))
        self.stream = int(self._stream)

    def allocate(self, size: int, purpose: str) -> int:
        """Device memory of `size` bytes; `purpose` is for the message where there is not enough."""
        result = self.driver.cuMemAlloc(max(size, 1))
        if result[0] == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self._call("cuMemGetInfo", self.driver.cuMemGetInfo())
            raise RequestError(
                f"out of GPU memory: {purpose} needs {size / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB of "
                f"{total / 2**20:.0f} are free on {self.name}; use fewer slots or a smaller capacity"
            )
        return int(self._call("cuMemAlloc", result))

    def free(self, address: int) -> None:
        self._call("cuMemFree", self.driver.cuMemFree(address))

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A page-locked numpy array, whose copies a graph can replay."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        address = int(self._call("cuMemAllocHost", self.driver.cuMemAllocHost(size)))
        buffer = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memoryview(buffer), dtype, count=int(np.prod(shape))).reshape(shape)

    def free_host(self, array: np.ndarray) -> None:
        self._call("cuMemFreeHost", self.driver.cuMemFreeHost(array.ctypes.data))

    def zero(self, address: int, size: int) -> None:
        self._call("cuMemsetD8Async", self.driver.cuMemsetD8Async(address, 0, size, self._stream))

    def upload(self, address: int, array: np.ndarray) -> None:
        """Start copying a contiguous host array to `address`."""
        call = self.driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream)
        self._call("cuMemcpyHtoDAsync", call)

    def download(self, array: np.ndarray, address: int) -> None:
        """Start copying from `address` into a contiguous host array."""
        call = self.driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream)
        self._call("cuMemcpyDtoHAsync", call)

    def copy(self, to: int, address: int, size: int) -> None:
        self._call("cuMemcpyDtoDAsync", self.driver.cuMemcpyDtoDAsync(to, address, size, self._stream))

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.driver.cuStreamSynchronize(self._stream))

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Record what the block puts on the stream, without running it: the list then holds the executable graph."""
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self.driver.cuStreamBeginCapture(self._stream, mode))
        held: list[Any] = []
        try:
            yield held
        except BaseException:
            self.driver.cuStreamEndCapture(self._stream)  # the stream is usable again; the graph is broken anyway
            raise
        graph = self._call("cuStreamEndCapture", self.driver.cuStreamEndCapture(self._stream))
        held.append(self._call("cuGraphInstantiate", self.driver.cuGraphInstantiate(graph, 0)))
        self._call("cuGraphDestroy", self.driver.cuGraphDestroy(graph))

    def launch(self, graph: Any) -> None:
        self._call("cuGraphLaunch", self.driver.cuGraphLaunch(graph, self._stream))

    def forget(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", self.driver.cuGraphExecDestroy(graph))

    def _call(self, name: str, result: Any) -> Any:
        return _check(self.driver, name, result)


def _check(driver: Any, name: str, result: Any) -> Any:
    """cuda-python returns (error, value…): the value, or `RequestError`."""
    error, *values = result if isinstance(result, tuple) else (result,)
    if error != driver.CUresult.CUDA_SUCCESS:
        text = driver.cuGetErrorString(error)[1]
        words = text.decode() if isinstance(text, bytes) else str(error)
        raise RequestError(f"CUDA's {name} failed: {words}")
    return values[0] if len(values) == 1 else tuple(values)
