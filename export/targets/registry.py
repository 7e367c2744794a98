"""The targets, one line each. Whoever registers another adds it here, under its own name."""

from typing import Any

from export.errors import ExportError
from export.targets.base import Target
from export.targets.genai import GENAI
from export.targets.hf_onnx import HF_ONNX
from export.targets.onnx_artifact import ONNX
from export.targets.tensorrt import TENSORRT
from export.targets.web import WEB

TARGETS: dict[str, Target[Any]] = {
    ONNX.name: ONNX,
    TENSORRT.name: TENSORRT,
    GENAI.name: GENAI,
    HF_ONNX.name: HF_ONNX,
    WEB.name: WEB,
}


def find_target(name: str) -> Target[Any]:
    """The target of this name. Raises `ExportError` where none is registered."""
    if name not in TARGETS:
        raise ExportError(f"{name[:60]!r} is no target of wm-export; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
