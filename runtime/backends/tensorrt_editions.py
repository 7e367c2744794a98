"""TensorRT in its two editions, which share one API: `tensorrt` needs a GPU, `tensorrt_rtx` builds without one."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def installed(builder: str) -> bool:
    """Whether the edition `builder` can be imported."""
    return importlib.util.find_spec(MODULES[builder]) is not None


def how_to_install(builder: str) -> str:
    return f"install it with pip install 'wm-models[{builder}]'"


def rtx_capabilities(module: Any) -> dict[str, str]:
    """The compute capabilities that tensorrt-rtx, imported as `module`, has code for: "8.9", with its name for it.

    It has none for data centre GPUs after the A100's 8.0: 9.0 is an H100's.
    """
    names = module.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": name for name in names if name.startswith("SM")}


def later_than(capability: str, others: Iterable[str]) -> bool:
    """Whether "12.1" is later than all others: then tensorrt-rtx makes its code from theirs when it is loaded."""
    return _number(capability) > max(map(_number, others))


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def import_builder(builder: str) -> Any:
    """The module of the edition `builder`. Raises ModuleNotFoundError where it is not installed."""
    return importlib.import_module(MODULES[builder])
