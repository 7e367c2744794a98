"""Load an exported model and generate or classify with it: numpy, ONNX Runtime, tokenizers, nothing else of weight."""

from importlib.metadata import version

from runtime.engine import Engine, load
from runtime.errors import ArtifactError, RequestError, SignatureError

__version__ = version("wm-models")

__all__ = ["ArtifactError", "Engine", "RequestError", "SignatureError", "load"]
