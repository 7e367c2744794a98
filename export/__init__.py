"""Lower a model to an artifact that `runtime` loads, and compare it with the eager model."""

import logging
from importlib.metadata import version

from export.api import build_tensorrt, export_onnx, sign, verify
from export.errors import ExportError, VerificationError
from export.progress import Progress
from export.targets.onnx_artifact import OnnxOptions
from export.targets.tensorrt import TensorRTOptions
from export.verification.comparison import Comparison

__version__ = version("wm-models")
__all__ = [
    "Comparison",
    "ExportError",
    "OnnxOptions",
    "Progress",
    "TensorRTOptions",
    "VerificationError",
    "build_tensorrt",
    "export_onnx",
    "sign",
    "verify",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the application wants to hear
