"""The GPU suite over stand-ins: all of it passes there, and a stand-in that errs in one place does not."""

import ctypes
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import baseline, ours
from onnx import helper, numpy_helper
from test_export.conftest import PAIR, lowered, save_checkpoint
from test_runtime import standin
from test_runtime.standin import Context, Driver, Engine, Module, Result

from export import OnnxOptions
from export.bench import measure as measuring
from export.package.manifest import write_manifest
from export.source import Source
from export.targets import tensorrt as target
from export.targets.base import Draft
from export.targets.onnx_artifact import ONNX
from runtime.artifact.integrity import read_artifact
from runtime.backends import ort_gpu
from test_gpu import material as materials
from test_gpu import stages, test_gpu
from test_gpu.conftest import lack, open_suite
from test_gpu.locating import cpu_answers, eager_answers
from test_gpu.material import WINDOWED, Material, Plan
from test_gpu.report import FAILED, NOT_RUN, PASSED
from test_gpu.stages import STAGES

BASELINE = {"generate_seconds": 1.0, "prefill_seconds": 0.5, "step_seconds": 0.5, "context_seconds": {}}
CARD = "NVIDIA L4"  # of which the roofline has figures
NAMED = {stage.name: stage for stage in STAGES}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    dense = ours(baseline(num_hidden_layers=2, eos_token_id=None), expert_routing="token")
    dense.model.norm.weight.data *= 0.25  # four bits blur logits unless they are small
    dense.save_pretrained(root / "dense")
    save_checkpoint(root / "hybrid", **PAIR)
    names = {"dense": str(root / "dense"), "hybrid": str(root / "hybrid"), "speed": str(root / "dense")}
    return Plan(
        **names, dtypes=("fp32", "fp16"), schemes=("int4",), length=96, steps=6, long_steps=40, prompts=(1, 17),
        keep=16, spare=12, prompt_length=8, new_tokens=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def material(plan, tmp_path_factory):
    """What every run of the suite uses: it is made once. The graphs are compared by the suite alone."""
    root = tmp_path_factory.mktemp("artifacts")
    for source, name, dtype in (
        (plan.dense, "dense", "fp32"), (plan.dense, "dense", "fp16"), (plan.dense, WINDOWED, "fp32"),
        (plan.hybrid, "hybrid", "fp32"),
    ):  # fmt: skip
        model = Source(source).load_model()
        if name == WINDOWED:
            model.config.keep_window_size = plan.keep
        sizes = {"max_batch": plan.slots, "max_length": plan.length, "spare": plan.spare}
        lowered(root / f"{name}-{dtype}", model, dtype, **sizes)
    for scheme in plan.schemes:
        draft = Draft(root / f"dense-{scheme}", plan.dense)
        draft.directory.mkdir()
        ONNX.write(draft, OnnxOptions(quantize=scheme, max_batch=plan.slots, max_length=plan.length, spare=plan.spare))
        write_manifest(draft.directory, draft.manifest, verified=True)
    return Material(root, plan)


@pytest.fixture
def machine(monkeypatch):
    """A GPU with its driver, TensorRT-RTX and ONNX Runtime's build for it, all of them stand-ins."""
    driver = Driver(name=CARD)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Module(driver))
    monkeypatch.setattr(target, "run_builder", standin.run_builder)
    for module in (ort_gpu, stages):
        monkeypatch.setattr(module, "missing", lambda provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", standin.open_session)
    monkeypatch.setattr(measuring, "_baseline", lambda *request: BASELINE)
    return driver


@pytest.fixture
def suite(material, machine, tmp_path):
    assert lack() is None
    return open_suite(material, tmp_path / "report.md")


def test_all_of_it_passes(suite, machine):
    for stage in STAGES:
        test_gpu.test_stage(suite, stage)
    assert [result.verdict for result in suite.results.values()] == [PASSED] * len(STAGES)
    text = suite.report.path.read_text()
    assert text.startswith(f"# {CARD}\n\nCompute capability 8.9, driver's CUDA 13.2, ")
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        f"## {stage.name}: passed, {suite.results[stage.name].seconds:.0f} s" for stage in STAGES
    ]
    assert "| NO |" not in text
    for dtype in suite.plan.dtypes:
        assert f"| {dtype}: predicted at 80% of the bandwidth of L4, tokens/s |" in text
        assert f"| {dtype}: measured over predicted |" in text
    assert machine.used == 0, "the suite left memory behind"


def stale_binding(patch):
    """A buffer's address is taken once, and its later ones are not."""
    patch.setattr(
        Context, "set_tensor_address", lambda self, name, address: bool(self.addresses.setdefault(name, address))
    )


def profile_not_switched(patch):
    patch.setattr(
        Context, "set_optimization_profile_async", lambda self, index, stream: setattr(self, "profile", 0) or True
    )


def missed_synchronisation(patch):
    """The host goes on before the device is done."""
    patch.setattr(Driver, "cuStreamSynchronize", lambda self, stream: (Result.CUDA_SUCCESS,))


def replay_with_old_addresses(patch):
    """The first graph is launched for all later ones."""
    made = []
    patch.setattr(
        Driver,
        "cuGraphInstantiate",
        lambda self, graph, flags: (Result.CUDA_SUCCESS, made.append(list(graph)) or made[0]),
    )
    patch.setattr(Driver, "cuGraphExecDestroy", lambda self, graph: (Result.CUDA_SUCCESS,))


def replay_with_old_inputs(patch):
    """A graph uploads what the host held when it was captured."""
    upload = Driver.cuMemcpyHtoDAsync

    def frozen(self, to, address, size, stream):
        if self.capturing is None:
            return upload(self, to, address, size, stream)
        held = ctypes.string_at(address, size)
        return self.put(lambda: ctypes.memmove(self.block(to, size), held, size))

    patch.setattr(Driver, "cuMemcpyHtoDAsync", frozen)


def logits_of_the_wrong_slot(patch):
    run = Engine.run

    def rolled(self, shapes, addresses):
        run(self, shapes, addresses)
        slots = shapes["input_ids"][0]
        logits = self.view("logits", (slots, 1, 211), addresses)
        logits[...] = logits[[*range(1, slots), 0]]

    patch.setattr(Engine, "run", rolled)


def cache_not_written(patch):
    """One layer's values stay as they were."""
    run = Engine.run

    def forgetful(self, shapes, addresses):
        value = self.view("layers.1.value", shapes["layers.1.value"], addresses)
        before = value.copy()
        run(self, shapes, addresses)
        value[...] = before

    patch.setattr(Engine, "run", forgetful)


def states_not_copied(patch):
    patch.setattr(Driver, "cuMemcpyDtoDAsync", lambda self, *arguments: (Result.CUDA_SUCCESS,))


def large_uploads_lost(patch):
    """Rows that were moved together on the host do not arrive."""
    upload = Driver.cuMemcpyHtoDAsync
    patch.setattr(
        Driver, "cuMemcpyHtoDAsync",
        lambda self, to, address, size, stream: (
            upload(self, to, address, size, stream) if size < 2000 else (Result.CUDA_SUCCESS,)
        ),
    )  # fmt: skip


def memory_not_freed(patch):
    patch.setattr(Driver, "cuMemFree", lambda self, address: (Result.CUDA_SUCCESS,))


def codes_misread(patch):
    spoil(patch, lambda node: node.op_type == "DequantizeLinear", 4.0)


WRONG = "layers.1.mlp.up_proj.matmul"


def kernel_that_errs(patch):
    spoil(patch, lambda node: node.name == WRONG, 1.05)


def spoil(patch, choose, factor):
    """What the GPU computes in one node is off by a factor."""
    made = standin.InferenceSession

    def off(data, *rest, **options):
        model = onnx.load_from_string(data)
        for node in [node for node in model.graph.node if choose(node)][:1]:
            kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
            kind = next(kinds[name] for name in node.input[1:] if kinds.get(name) in (1, 10))
            scale = numpy_helper.from_array(helper.tensor_dtype_to_np_dtype(kind).type(factor), "off")
            model.graph.initializer.append(scale)
            name, node.output[0] = node.output[0], "sound"
            model.graph.node.insert(
                list(model.graph.node).index(node) + 1, helper.make_node("Mul", ["sound", "off"], [name])
            )
        return made(model.SerializeToString(), *rest, **options)

    patch.setattr(standin, "InferenceSession", off)


# What each wrong stand-in must be caught by.
MUTANTS = {
    stale_binding: ["CUDA graph replay"],
    profile_not_switched: ["TensorRT engines"],
    missed_synchronisation: ["device and versions", "one kernel", "ONNX Runtime on CUDA", "TensorRT engines"],
    replay_with_old_addresses: ["CUDA graph replay"],
    replay_with_old_inputs: ["TensorRT engines", "CUDA graph replay"],
    logits_of_the_wrong_slot: ["ragged batches"],
    cache_not_written: ["TensorRT engines", "many steps"],
    states_not_copied: ["device and versions", "Cheems"],
    large_uploads_lost: ["window eviction"],
    memory_not_freed: ["memory"],
    codes_misread: ["quantised engines"],
    kernel_that_errs: ["ONNX Runtime on CUDA", "TensorRT engines"],
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_stand_in_is_caught(suite, monkeypatch, mutant):
    """By each of these stages, which go on after another one failed. What explains a failure has tests of its own."""
    mutant(monkeypatch)
    monkeypatch.setattr(stages.Suite, "explain", lambda suite, *failed: None)
    for name in MUTANTS[mutant]:
        result = suite.run(stages.Stage(name, NAMED[name].check))
        assert result.verdict == FAILED, name
        assert f"## {name}: FAILED" in (text := suite.report.path.read_text())
        assert "| NO |" in text


@pytest.mark.parametrize("name", ["ONNX Runtime on CUDA", "TensorRT engines"])
def test_the_first_wrong_tensor_is_named(suite, monkeypatch, name):
    kernel_that_errs(monkeypatch)
    evidence = suite.run(stages.Stage(name, NAMED[name].check)).evidence
    found = [text for text in evidence if "first tensor that differs" in text]
    assert len(found) == 2  # in a prefill and in a step
    for text in found:
        assert f"is {WRONG} (operator MatMul, module model.layers.1.mlp.up_proj)" in text
        assert "layers.1.mlp.act_fn.mul agrees" in text
    for text in evidence:
        if text not in found:
            assert text.startswith(("model.tensorrt-rtx.engine: ", "Layers of model.tensorrt-rtx.engine"))


def test_what_is_wrong_between_steps_is_told_apart(suite, monkeypatch):
    """Where every tensor of a prefill and of a step agrees."""
    logits_of_the_wrong_slot(monkeypatch)
    evidence = suite.run(NAMED["ragged batches"]).evidence
    assert sum("logits and all before it agree; what fails lies between steps" in text for text in evidence) == 2


def test_a_quantised_engine_is_held_against_the_graph_on_the_cpu(suite, monkeypatch):
    codes_misread(monkeypatch)
    evidence = suite.run(stages.Stage("quantised engines", NAMED["quantised engines"].check)).evidence
    # the table's codes: a norm alone hides their factor, and the sum with what attention adds does not
    assert "differs is layers.0.post_attention_layernorm.rms_normalization (operator RMSNorm" in evidence[-1]


@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_the_graph_has_the_eager_models_values(material, family):
    """Every layer's parts are compared, and each agrees in ONNX Runtime on the CPU."""
    ids, compared = np.arange(3, 20), 0
    source = getattr(material.plan, family)
    eager = eager_answers(material.model(source), ids)
    for module, found in cpu_answers(read_artifact(material.graph(source)), ids).items():
        if module in eager and eager[module].shape[1] == found.shape[1]:
            expected = eager[module][-len(found) :]
            np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=module)
            compared += 1
    assert compared >= 2 * 6 + 2


def test_what_a_machine_lacks_is_written(suite, monkeypatch):
    """A stage is left out where a package is missing, and where what it needs failed."""
    for module in (ort_gpu, stages):
        monkeypatch.setattr(module, "missing", lambda provider: "no GPU build of ONNX Runtime")
    monkeypatch.setattr(materials, "installed", lambda builder: False)
    for name in ("one kernel", "ONNX Runtime on CUDA", "TensorRT engines", "CUDA graph replay", "many steps"):
        with pytest.raises(pytest.skip.Exception):
            test_gpu.test_stage(suite, NAMED[name])
    reasons = {name: result.reason for name, result in suite.results.items()}
    assert reasons["one kernel"] == "no GPU build of ONNX Runtime"
    assert reasons["ONNX Runtime on CUDA"] == "it needs what failed or was not run: one kernel"
    assert reasons["TensorRT engines"] == "neither tensorrt nor tensorrt-rtx is installed"
    assert reasons["many steps"] == f"{reasons['one kernel']}; {reasons['TensorRT engines']}"
    assert {result.verdict for result in suite.results.values()} == {NOT_RUN}
    assert "## many steps: not run" in suite.report.path.read_text()


def test_a_stage_that_breaks_is_written(suite, machine):
    """With its traceback; a stage that finds nothing has not passed."""
    machine.total = 0
    result = suite.run(NAMED["device and versions"])
    assert "RequestError: CUDA's cuMemAllocHost failed" in result.failures()
    assert "Traceback" in suite.report.path.read_text()
    assert suite.run(stages.Stage("empty", lambda suite, result: None)).verdict == FAILED
