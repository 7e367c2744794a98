"""The target `web`: a folder with a page that runs the model in a browser. Any web server shows it.

    index.html, app.js, worker.js      the page; the model runs off its thread
    model/                             what `hf-onnx` writes
    runtime/                           transformers.js, and ONNX Runtime in WebAssembly and for WebGPU

Nothing is loaded from another address.
"""

import os
import shutil
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from export.errors import ExportError
from export.targets.base import Draft, Target
from export.targets.hf_onnx import FOLDER, GRAPH, HF_ONNX, PORTABLE, HfOnnxOptions
from export.verification.comparison import Comparison
from export.verification.judging import Expected
from runtime.artifact.manifest import Manifest
from runtime.console import option

PAGE = ("index.html", "app.js", "worker.js")
MODEL, RUNTIME = "model", "runtime"
PACKAGES = {  # what is copied of node_modules: each file's package
    "transformers.min.js": "@huggingface/transformers",
    "ort-wasm-simd-threaded.asyncify.mjs": "onnxruntime-web",
    "ort-wasm-simd-threaded.asyncify.wasm": "onnxruntime-web",
}
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class WebOptions(HfOnnxOptions):
    """What the page is to have. Raises `ExportError` for a value that no browser takes."""

    quantize: str | None = option("int4", "Store the weights as int8 or int4, in blocks; none for --dtype as it is.")
    runtime: Path = option(
        Path("node_modules"), "The node_modules that `npm install @huggingface/transformers` made, copied from."
    )

    def __post_init__(self) -> None:
        if self.quantize == "none":
            object.__setattr__(self, "quantize", None)
        super().__post_init__()


class WebTarget(Target[WebOptions]):
    """What is in `model` is compared as `hf-onnx` compares it."""

    name = "web"
    help = "Write a folder with a page that runs the model in a browser."
    options = WebOptions

    def write(self, draft: Draft, options: WebOptions) -> Expected:
        """Write the page, the libraries that it loads, and the model."""
        sources = {name: options.runtime / package / "dist" / name for name, package in PACKAGES.items()}
        for path in sources.values():
            if not path.is_file():
                raise ExportError(
                    f"{path}: no such file; npm install @huggingface/transformers, and name its node_modules with "
                    "--runtime"
                )
        (draft.directory / RUNTIME).mkdir()
        for name, path in sources.items():
            shutil.copyfile(path, draft.directory / RUNTIME / name)
        page = files("export.targets") / "web_page"
        for name in PAGE:
            (draft.directory / name).write_bytes((page / name).read_bytes())
        (draft.directory / MODEL).mkdir()
        draft.open_source()  # once, for both drafts
        model = replace(draft, directory=draft.directory / MODEL)
        expected = HF_ONNX.write(model, _model_options(options))
        draft.manifest = model.manifest
        if not (model.directory / TOKENIZER).is_file():
            raise ExportError(f"{draft.source}: has no {TOKENIZER}, and a page needs one to read text")
        return expected

    def finish(self, draft: Draft, expected: Expected | None) -> list[Comparison]:
        """As `hf-onnx`; then the portable form of a quantised graph takes the place of the CPU's.

        ONNX Runtime in WebAssembly has no operator for look-ups in a quantised table.
        """
        model = replace(draft, directory=draft.directory / MODEL)
        model.manifest = draft.manifest
        comparisons = HF_ONNX.finish(model, expected)
        portable = model.directory / FOLDER / PORTABLE
        if portable.exists():
            portable.replace(portable.with_name(GRAPH))
        return comparisons

    def summary(self, directory: Path, manifest: Manifest) -> list[str]:
        """How large the model is, and how to look at the page."""
        size = sum(path.stat().st_size for path in (directory / MODEL).rglob("*") if path.is_file())
        return [
            *HF_ONNX.summary(directory, manifest),
            f"the model and its tokenizer: {size / 1e6:.1f} MB; any web server shows the page: "
            f"python -m http.server --directory {os.fspath(directory)}",
        ]


WEB = WebTarget()


def _model_options(options: WebOptions) -> HfOnnxOptions:
    return HfOnnxOptions(options.dtype, options.quantize, options.block_size, options.max_length)
