"""Lower a model to an artifact that `runtime` loads, and check it against the eager model."""

from importlib.metadata import version

from export.errors import ExportError, VerificationError
from export.package.signing import sign
from export.targets.onnx_graph import export_onnx
from export.targets.tensorrt import build_tensorrt
from export.verification.compare import Comparison, verify

__version__ = version("wm-models")

__all__ = ["Comparison", "ExportError", "VerificationError", "build_tensorrt", "export_onnx", "sign", "verify"]
