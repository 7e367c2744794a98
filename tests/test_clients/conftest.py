"""The shipped model as each client reads it, and where the clients are. A client that is missing is skipped by name."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from export import OnnxOptions, export_onnx
from export.targets.base import write_artifact
from export.targets.genai import GENAI, GenaiOptions
from export.targets.hf_onnx import HF_ONNX, HfOnnxOptions
from runtime import Engine, load
from runtime.text.tokenizer import encode

PROMPTS = ("def main(", "import os, sys and more text", "The")
TOKENS = 24
NODE_MODULES = Path(os.environ.get("NODE_MODULES", "node_modules"))
OPTIMUM_PYTHON = os.environ.get("OPTIMUM_PYTHON", "")

needs_genai = pytest.mark.skipif(
    find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai: pip install 'wm-models[genai]'"
)
needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs openvino: pip install 'wm-models[openvino]'"
)
needs_optimum = pytest.mark.skipif(
    not OPTIMUM_PYTHON, reason="needs optimum-onnx in an environment of its own, whose Python OPTIMUM_PYTHON names"
)


def needs_npm(package: str) -> pytest.MarkDecorator:
    found = shutil.which("node") and (NODE_MODULES / package).is_dir()
    reason = f"needs Node.js and {package}: npm install {package}, and name its node_modules with NODE_MODULES"
    return pytest.mark.skipif(not found, reason=reason)


def run_node(script: str, *arguments: object) -> list:
    """What a script of this directory prints, as JSON, run where Node.js finds the packages."""
    return _run_script(["node", "--input-type=module", "-"], script, arguments, NODE_MODULES.resolve().parent)


def run_optimum(script: str, *arguments: object) -> list:
    """What a script of this directory prints, as JSON, run by the Python of optimum's environment."""
    return _run_script([OPTIMUM_PYTHON, "-"], script, arguments, Path.cwd())


def _run_script(command: list[str], script: str, arguments: Iterable[object], here: Path) -> list:
    source = (Path(__file__).parent / script).read_text()
    done = subprocess.run(
        [*command, *map(str, arguments)], input=source, cwd=here, capture_output=True, text=True, timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def shipped(once) -> Path:
    """The shipped model's artifact, without its comparison with the eager model made twice."""
    made = once("shipped", lambda root: export_onnx("doge-3m", root / "artifact", OnnxOptions(max_length=128)))
    return made / "artifact"


@pytest.fixture(scope="session")
def for_genai(shipped, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("genai") / "artifact"
    assert all(found.passed for found in write_artifact(GENAI, shipped, directory, GenaiOptions()).comparisons)
    return directory


@pytest.fixture(scope="session")
def hf_layout(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hf") / "model"
    written = write_artifact(HF_ONNX, "doge-3m", directory, HfOnnxOptions(max_length=128))
    assert all(found.passed for found in written.comparisons)
    return directory


@pytest.fixture(scope="session")
def expected(shipped) -> list[list[int]]:
    """The ids that the engine writes after each of `PROMPTS`, greedily."""
    engine = load(shipped)
    return [greedy(engine, encode(engine.tokenizer, prompt, engine.artifact), TOKENS) for prompt in PROMPTS]


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    engine.reset()
    new = [int(engine.prefill([ids])[0].argmax())]
    while len(new) < count:
        new.append(int(engine.decode([new[-1]])[0].argmax()))
    return new
