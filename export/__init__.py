"""Lower a model to an artifact that `runtime` loads, and check it against the eager model."""

from .errors import ExportError, VerificationError
from .onnx import export_onnx
from .sign import sign
from .tensorrt import build_tensorrt
from .verify import Comparison, verify

__all__ = ["Comparison", "ExportError", "VerificationError", "build_tensorrt", "export_onnx", "sign", "verify"]
