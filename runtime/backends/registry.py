"""The backends by name, in the order in which "auto" tries them, and the choice among them."""

import logging

from runtime.artifact.manifest import Artifact
from runtime.backends.base import Backend
from runtime.backends.ort_cpu import CpuBackend
from runtime.backends.ort_gpu import CudaBackend, OrtTensorRTBackend
from runtime.backends.tensorrt import TensorRTBackend
from runtime.errors import RequestError

AUTO = "auto"
LOG = logging.getLogger(__name__)

# To add a backend: a file with its class, and an instance of that class in this list.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TensorRTBackend(), CudaBackend(), OrtTensorRTBackend(), CpuBackend())
}


def backend_names() -> tuple[str, ...]:
    """What the argument `backend` may be: "auto" and each backend's name."""
    return AUTO, *BACKENDS


def check_backend(name: str) -> None:
    """Raise `RequestError` unless `name` is one of `backend_names`."""
    if name not in backend_names():
        raise RequestError(f"backend is {name!r}; expected one of {', '.join(backend_names())}")


def choose_backend(artifact: Artifact, name: str = AUTO, device: int | None = None) -> Backend:
    """The backend called `name`; for "auto" the first that misses nothing, of those with cards where `device` is given.

    Raises `RequestError`: for an unknown name, for a `device` of a backend that has none, and where something is
    missing, with what that is.
    """
    check_backend(name)
    if name == AUTO:
        candidates = {key: each for key, each in BACKENDS.items() if device is None or each.has_devices}
    else:
        candidates = {name: BACKENDS[name]}
        if device is not None and not BACKENDS[name].has_devices:
            raise RequestError(f"device {device} is asked for, but backend {name} has no devices to choose from")
    reasons = {}
    for key, backend in candidates.items():
        reason = backend.missing(artifact)
        if reason is None:
            return backend
        reasons[key] = reason
        LOG.info("backend %s is passed over: %s", key, reason)
    if name != AUTO:
        raise RequestError(f"backend {name}: {reasons[name]}; backend auto takes one that can run here")
    raise RequestError("no backend can run here: " + "; ".join(f"{key}: {reason}" for key, reason in reasons.items()))
