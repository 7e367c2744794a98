"""Load an exported model and generate with it. Needs numpy, ONNX Runtime and tokenizers, nothing else of weight."""

from .engine import Engine, load
from .errors import ArtifactError, RequestError, SignatureError

__all__ = ["ArtifactError", "Engine", "RequestError", "SignatureError", "load"]
