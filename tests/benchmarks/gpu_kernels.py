"""What torch.compile would launch on a GPU in a decode step, found without one.

python tests/benchmarks/gpu_kernels.py [PRESET] [--layers 1 2] [--capabilities 80 90 120]

It needs Triton beside the CPU build of torch, in an environment of its own. The step (`model.step`, batch 1) is traced
on the CPU, and its graph is moved to a GPU that is not there, by fake tensors and a device interface that answers for
it. Inductor makes its code, and Triton's ptxas compiles each kernel for every compute capability. The table gives the
Triton kernels and the library's calls that a step launches, and of the compiled kernels the most registers of a thread
and the bytes that spill. Inductor's own patterns are off, since they run their examples on the device, and attention is
traced as products. A graph break would be an error, by `fullgraph`.

A training step does not get so far: one of Inductor's passes (torch/_inductor/fx_passes/reinplace.py) indexes fake
tensors in Python, which a CPU build of torch refuses for a device of another kind.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import triton  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.table import Table
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import detect_fake_mode
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.backends.nvidia.compiler import get_ptxas  # pyright: ignore[reportMissingImports]
from triton.runtime.driver import driver  # pyright: ignore[reportMissingImports]

from wm_models import preset
from wm_models.doge import DogeForCausalLM

CAPACITY = 1024
STATIC_LAUNCHER = "use_static_triton_launcher"
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


class Captured(Exception):
    """The code is there; nothing of it can be loaded without a device."""


class AbsentGpu(device_interface.CudaInterface):
    """Answers of a GPU that is not there, of the compute capability that `properties` has."""

    properties = SimpleNamespace(
        name="absent", multi_processor_count=108, warp_size=32, regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=99 << 10, shared_memory_per_multiprocessor=100 << 10, total_memory=80 << 30,
        L2_cache_size=40 << 20, gcnArchName="", major=8, minor=0,
    )  # fmt: skip

    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: AbsentGpu.properties)

    get_device_properties = staticmethod(lambda device=None: AbsentGpu.properties)
    get_compute_capability = staticmethod(lambda device=None: 10 * AbsentGpu.properties.major)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    set_device = staticmethod(lambda device: None)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    synchronize = staticmethod(lambda device=None: None)
    get_raw_stream = staticmethod(lambda device: 0)


def pretend(capability: int) -> None:
    """Have Inductor and Triton find a GPU of this compute capability, such as 80."""
    AbsentGpu.properties.major, AbsentGpu.properties.minor = divmod(capability, 10)
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )  # fmt: skip
    driver.set_active(target)
    device_interface.get_interface_for_device("cpu")  # which registers the real ones first
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, AbsentGpu)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: AbsentGpu.properties


def captured(run: Callable[[Any], object]) -> str:
    """The code that Inductor makes of the graph that is compiled while `run(backend)` runs."""
    codes: list[str] = []

    def keep(code: str) -> None:
        codes.append(code)
        raise Captured

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        copy = torch.fx.GraphModule(graph, deepcopy(graph.graph))
        try:
            compile_fx_inner(copy, on_gpu(copy, inputs))
        except InductorError as error:
            if not isinstance(error.inner_exception, Captured):
                raise
        return make_boxed_func(graph.forward)

    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)),
        mock.patch.object(joint_graph, "lazy_init", return_value=None),
        mock.patch.object(post_grad, "lazy_init", return_value=None),
        inductor_config.patch(pattern_matcher=False, shape_padding=False, compile_threads=1, fx_graph_cache=False),
    ):
        run(aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table()))
    torch._dynamo.reset()
    (code,) = codes
    return code


def on_gpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Move a graph, in place, and its inputs to the absent GPU; the inputs, fake."""
    gpu = torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": gpu}
    graph.recompile()
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with mode:
        moved = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=gpu)
            if isinstance(each, torch.Tensor)
            else each
            for each in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def decode_code(name: str, layers: int, dtype: torch.dtype) -> str:
    """Inductor's code of a preset's decode step with so many layers."""
    config = preset(name)
    config.num_hidden_layers = layers
    model = DogeForCausalLM(config).to(dtype).eval()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    lengths = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)

    def decode(backend: Any) -> None:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            step = torch.compile(model.step, fullgraph=True, backend=backend, dynamic=False)
            step(ids, *lengths, model.new_caches(1, CAPACITY))

    return captured(decode)


def compiled(code: str, capability: int) -> tuple[int, int, int]:
    """Of a code's kernels: how many there are, the most registers of a thread, and the bytes that spill in all."""
    kernels = KERNEL.findall(code)
    registers, spills = 0, 0
    for name, source in kernels:
        # what looks for a device, and what keeps no assembly, are put aside
        with mock.patch.object(triton_helpers, "set_driver_to_gpu"), inductor_config.patch(STATIC_LAUNCHER, False):
            tuner = getattr(PyCodeCache.load(source), name)
            kernel = tuner._precompile_config(tuner.configs[0]).kernel
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(kernel.asm["ptx"])
            file.flush()
            kind = f"sm_{capability}{'a' if capability >= 90 else ''}"
            command = [get_ptxas(capability).path, "-v", f"--gpu-name={kind}", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = max(registers, *map(int, re.findall(r"Used (\d+) registers", said)))
        spills += sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    return len(kernels), registers, spills


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", nargs="?", default="doge-160m")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 120])
    given = parser.parse_args()
    title = f"{given.preset}, decode, float16, torch {torch.__version__}, Triton {triton.__version__}"
    columns = ("capability", "layers", "Triton launches", "library calls", "kernels", "registers", "spilled bytes")
    table = Table(*columns, title=title, title_justify="left")
    for capability in given.capabilities:
        pretend(capability)
        for layers in given.layers:
            code = decode_code(given.preset, layers, torch.float16)
            launches = len(re.findall(r"^ +triton_\w+\.run\(", code, re.MULTILINE))
            calls = len(re.findall(r"^ +(?:\w+ = )?(?:extern_kernels|torch\.ops)\.\S+\(", code, re.MULTILINE))
            table.add_row(*map(str, (capability, layers, launches, calls, *compiled(code, capability))))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
