"""ONNX Runtime itself, as the CPU and the GPU backends use it. It is imported where a session is opened."""

from typing import Any

from runtime.errors import RequestError

MISSING = "ONNX Runtime is not installed; install it with pip install 'wm-models[cpu]' or, for a GPU, 'wm-models[gpu]'"


def import_onnxruntime() -> Any:
    """The module, of whichever package brings it: onnxruntime or onnxruntime-gpu. Raises `RequestError`."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise RequestError(MISSING) from error
    return onnxruntime


def session_options(threads: int | None) -> Any:
    """ONNX Runtime's options for `threads`, None for its own choice."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(model: str | bytes, options: Any, providers: list[Any]) -> Any:
    """A session on a graph's path, or bytes with the weights' places below "/", on these providers and no others."""
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/")
    return import_onnxruntime().InferenceSession(model, options, providers=providers, enable_fallback=0)


def first_line(error: Exception) -> str:
    """ONNX Runtime's own message. The rest of it says where in its sources the error arose."""
    return (str(error).splitlines() or [type(error).__name__])[0]
