"""The console commands: wm-export and wm-train say which extra is missing before they import the code that needs it.

wm-run starts without any: the backends, chat templates and the server name their own.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

# The modules that each extra of pyproject.toml brings, by their import names. cpu stands for gpu too.
CPU = ("onnxruntime",)
MODELS = ("einx", "huggingface_hub", "safetensors", "torch", "transformers")
EXTRAS = {
    "cpu": CPU,
    "export": (*MODELS, "jinja2", "matplotlib", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"),
    "train": (*MODELS, "accelerate", "datasets", "matplotlib", "pyarrow", "tensorboard", "tomli_w"),
}


def wm_run() -> None:
    _start("runtime.cli")


def wm_export() -> None:
    _require("wm-export", "export", "cpu")
    _start("export.cli")


def wm_train() -> None:
    _require("wm-train", "train")
    _start("wm_models.training.cli")


def _start(module: str) -> None:
    """Run a command line by its module's name: the runtime's own code imports no other package."""
    import_module(module).main()


def _require(command: str, *extras: str) -> None:
    """Leave with exit code 2 and one line where a package of the extras is not installed."""
    missing = [extra for extra in extras if not all(map(find_spec, EXTRAS[extra]))]
    if not missing:
        return
    absent = [name for extra in missing for name in EXTRAS[extra] if find_spec(name) is None]
    gpu = ", or gpu in place of cpu for an NVIDIA GPU" if "cpu" in missing else ""
    install = f"pip install 'wm-models[{','.join(missing)}]'{gpu}"
    print(f"{command}: error: not installed: {', '.join(absent)}; install with {install}", file=sys.stderr)
    sys.exit(2)
