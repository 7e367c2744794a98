"""What others' tools make of the exported graphs: they check, infer, evaluate, simplify and parse them."""

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from test_export.conftest import VARIANTS, save_checkpoint

from export import OnnxOptions, export_onnx
from export.targets.onnx_artifact import FIXED
from runtime import Engine, load
from runtime.artifact.manifest import LOGITS_INDEX
from test_clients.conftest import greedy, needs_npm, run_node

IDS, STEPS = [5, 9, 17, 3, 120, 44, 8], 4
GRAPHS = ["dense", "experts", "hybrid", "window"]


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"needs {module}: pip install {module}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)`: a variant's artifact with a graph of a fixed capacity, exported once."""
    artifacts = {}

    def make(name, **changes):
        if name not in artifacts:
            root = tmp_path_factory.mktemp("tools")
            fields, options = VARIANTS[name]
            checkpoint = save_checkpoint(root / "checkpoint", **fields)
            options = {**options, "max_length": 64, "capacity": 32}
            export_onnx(checkpoint, root / "artifact", OnnxOptions(**options))
            artifacts[name] = root / "artifact"
        return artifacts[name]

    return make


def feed(engine: Engine, ids: list[int], capacity: int = 32) -> dict[str, np.ndarray]:
    """The inputs of a first step of one slot."""
    graph = engine.graph
    states = {state.input: np.zeros(state.sized(1, capacity), state.dtype) for state in graph.states}
    lengths = {name: np.zeros(1, np.int64) for name in graph.inputs[1:]}
    lengths |= {"sequence_lengths": np.array([len(ids)]), LOGITS_INDEX: np.array([[len(ids) - 1]])}
    return {"input_ids": np.array([ids]), **lengths, **states}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_onnx_checks_it_whole_and_infers_every_shape(made, name):
    for file in ("model.onnx", FIXED):
        path = made(name) / file
        onnx.checker.check_model(path, full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_the_reference_evaluator_says_what_the_engine_says(made, name):
    """In float32. In float16 onnx's own RMSNormalization overflows: it ignores `stash_type`."""
    engine = load(made(name))
    evaluator = ReferenceEvaluator(str(made(name) / "model.onnx"))
    found: Any = evaluator.run(["logits"], feed(engine, IDS))  # type: ignore[arg-type]
    logits = found[0]
    expected = engine.prefill([IDS])
    assert np.abs(logits[0] - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "command"), [
    ("onnxslim", ["{graph}", "{out}"]),
    ("onnxsim", ["{graph}", "{out}"]),
    ("polygraphy", ["surgeon", "sanitize", "--fold-constants", "{graph}", "-o", "{out}"]),
])  # fmt: skip
def test_a_simplified_graph_says_the_same(made, tool, command, tmp_path):
    program = Path(sys.executable).with_name(tool)
    if not program.exists():
        pytest.skip(f"needs {tool}: pip install {tool}")
    import onnxruntime

    engine = load(made("dense"))
    graph, out = made("dense") / "model.onnx", tmp_path / "simple.onnx"
    arguments = [part.format(graph=graph, out=out) for part in command]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
    assert out.exists(), done.stdout[-1000:] + done.stderr[-1000:]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    kept = {each.name for each in session.get_inputs()}  # onnxslim drops what nothing reads: `sequence_lengths`
    found: Any = session.run(["logits"], {name: value for name, value in feed(engine, IDS).items() if name in kept})
    np.testing.assert_allclose(found[0][0], engine.prefill([IDS]), atol=1e-4)


@needs_npm("onnxruntime-node")
@pytest.mark.slow
def test_onnxruntime_node_runs_the_artifact_as_it_is(made):
    engine = load(made("dense"))
    states = [[state.input, state.output, state.sized(1, 32)] for state in engine.graph.states]
    found = run_node("onnxruntime_node.mjs", made("dense") / "model.onnx", json.dumps([IDS, STEPS, states]))
    assert found == greedy(engine, IDS, STEPS)


@pytest.mark.slow
@needs("tensorrt_rtx")
@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_tensorrt_parses_the_graph_of_a_fixed_capacity_and_no_other(made, name):
    trt: Any = import_module("tensorrt_rtx")

    for file, parsed in ((FIXED, True), ("model.onnx", False)):
        network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
        assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(str(made(name) / file)) is parsed
