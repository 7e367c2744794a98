"""Load an exported model and generate or classify with it: numpy, ONNX Runtime, tokenizers, nothing else of weight."""

import logging

from runtime.backends.registry import BACKENDS
from runtime.batch import classify_file, generate_file, generate_many
from runtime.engine import Engine, load
from runtime.errors import ArtifactError, RequestError, SignatureError
from runtime.prompts import Prompt, read_prompts
from runtime.scheduler import Event, Request, Scheduler
from runtime.text.constraint import json_object, json_schema, lark, regex
from runtime.text.labels import label_scores
from runtime.text.sampling import Sampler, Sampling

__all__ = [
    "BACKENDS",
    "ArtifactError",
    "Engine",
    "Event",
    "Prompt",
    "Request",
    "RequestError",
    "Sampler",
    "Sampling",
    "Scheduler",
    "SignatureError",
    "__version__",
    "classify_file",
    "generate_file",
    "generate_many",
    "json_object",
    "json_schema",
    "label_scores",
    "lark",
    "load",
    "read_prompts",
    "regex",
]


__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, read when it is asked for: what reads it takes 3.5 MB."""
    if name == "__version__":
        from importlib.metadata import version

        return version("wm-models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the application wants to hear
