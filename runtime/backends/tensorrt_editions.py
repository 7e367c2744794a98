"""TensorRT in its two editions, which share one API: `tensorrt` needs a GPU, `tensorrt_rtx` builds without one."""

import importlib
import importlib.util
from typing import Any

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def installed(builder: str) -> bool:
    """Whether the edition `builder` can be imported."""
    return importlib.util.find_spec(MODULES[builder]) is not None


def how_to_install(builder: str) -> str:
    return f"install it with pip install 'wm-models[{builder}]'"


def import_builder(builder: str) -> Any:
    """The module of the edition `builder`. Raises ModuleNotFoundError where it is not installed."""
    return importlib.import_module(MODULES[builder])
