"""What the GPU suite checks, in the order in which a first failure costs least.

B batch (slots), S new tokens, V vocabulary.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from export.bench.cards import find_card
from export.bench.cost import PRECISIONS
from export.bench.measure import BaselineOptions, measure
from export.bench.roofline import SHARE, roofline
from export.inspection import inspect_artifact
from export.verification.cases import Case
from export.verification.comparison import ROUNDED_PRODUCTS_KL_LIMIT, compare
from export.verification.judging import run_case
from runtime import Engine, load
from runtime.artifact.integrity import read_artifact
from runtime.backends.cuda import Device
from runtime.backends.ort import open_session, session_options
from runtime.backends.ort_gpu import missing, provider_options
from runtime.backends.tensorrt import TensorRTSession, choose_engine
from runtime.bench import BenchOptions
from test_gpu.locating import cpu_answers, eager_answers, first_difference
from test_gpu.material import Material, Plan, Unavailable
from test_gpu.report import Report, Result, Row

LIMIT = 1e-3  # of float32 logits, times max(1, max|logit|), and of the mean KL of the narrower types


@dataclass(eq=False)
class Suite:
    """One run: what it is run on, its report, and the stages' results so far."""

    material: Material
    report: Report
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.material.plan

    def run(self, stage: "Stage") -> Result:
        """The result of a stage, which is written to the report when it ends, whatever it does."""
        result = self.results[stage.name] = Result(stage.name)
        broken = [name for name in stage.needs if name in self.results and self.results[name].verdict != "passed"]
        started = time.monotonic()
        try:
            if broken:
                raise Unavailable(f"it needs what failed or was not run: {', '.join(broken)}")
            stage.check(self, result)
        except Unavailable as lack:
            result.reason = str(lack)
        except Exception as error:  # a card's first run may fail in any way, and the report must tell it
            words = " ".join(str(error).split())
            result.rows.append(Row("stopped", f"{type(error).__name__}: {words}", passed=False))
            result.evidence.append(traceback.format_exc())
        result.seconds = time.monotonic() - started
        self.report.add(result)
        return result

    def artifact(self, backend: str, source: str, dtype: str = "fp32", quantize: str | None = None) -> Path:
        if backend == "tensorrt":
            return self.material.engine(source, dtype, quantize)[0]
        if reason := missing("cuda"):
            raise Unavailable(reason)
        return self.material.graph(source, dtype, quantize)

    def compare(self, result: Result, backend: str, source: str, cases: list[Case], dtype: str = "fp32") -> None:
        """A row for each case: the backend's logits beside the eager model's; evidence where one fails."""
        directory, sound = self.artifact(backend, source, dtype), True
        with load(directory, backend=backend) as engine:
            for case in cases:
                rows, logits = self.material.answers(source, case)
                verdict = compare(case, logits, run_case(engine, case, rows), None)
                exact = dtype == "fp32"
                found = verdict.max_difference if exact else verdict.mean_kl
                limit = LIMIT * max(1.0, max(float(np.abs(row).max()) for row in logits)) if exact else LIMIT
                sound &= bool(passed := np.isfinite(found) and found <= limit)
                what = f"{backend}, {dtype}, {case.name}: {'max |Δlogit|' if exact else 'mean KL'}"
                result.rows.append(Row(what, f"{found:.1e}", f"{limit:.1e}", bool(passed)))
        if not sound:
            self.explain(result, directory, backend, source)

    def explain(self, result: Result, directory: Path, backend: str, source: str | None) -> None:
        """Evidence of what failed: the engine's layers, and the first tensor that differs in prefill and in decode.

        `source`: of the eager model; None where the graph on the CPU is the reference, as of quantised weights.
        """
        artifact = read_artifact(directory)
        for title, columns, rows in inspect_artifact(directory).tables:
            if backend == "tensorrt" and ".engine" in title and "Files" not in title:
                lines = ["  ".join(row) for row in (columns, *rows)]
                result.evidence.append("\n".join([title, *lines]))
        ids = np.random.default_rng(1).permutation(artifact.graph.vocabulary)[:17]
        answers = cpu_answers(artifact, ids) if source is None else eager_answers(self.material.model(source), ids)
        for chunks in ([ids], [ids[:16], ids[16:]]):
            result.evidence.append(first_difference(artifact, backend, answers, chunks))


Check = Callable[[Suite, Result], None]


@dataclass(frozen=True)
class Stage:
    """One stage; it is run only where those that it `needs` passed or were left out."""

    name: str
    check: Check
    needs: tuple[str, ...] = ()


def memory_and_copies(suite: Suite, result: Result) -> None:
    """The machine is in the report's head; here memory is written, copied on the device and read."""
    device = Device()
    array = device.host_array((1024,), np.float32)
    array[:] = np.arange(1024)
    first, second = (device.allocate(array.nbytes, "the suite") for _ in range(2))
    device.upload(first, array)
    device.synchronize()
    array[:] = -1
    device.copy(second, first, array.nbytes)
    device.zero(first, array.nbytes)
    device.download(array, second)
    device.synchronize()
    result.rows.append(
        Row("bytes that came back as they went", str(int((array == np.arange(1024)).sum()) * 4), "4096",
            bool((array == np.arange(1024)).all()))
    )  # fmt: skip
    for address in (first, second):
        device.free(address)
    device.free_host(array)


def one_kernel(suite: Suite, result: Result) -> None:
    """A product in ONNX Runtime's CUDA provider over this runtime's own buffers."""
    if reason := missing("cuda"):
        raise Unavailable(reason)
    size, device, draw = 64, Device(), np.random.default_rng(0)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "xwy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "one", values[:2], values[2:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    graph = read_artifact(suite.material.graph(suite.plan.dense)).graph
    session = open_session(
        model.SerializeToString(), session_options(None), provider_options("cuda", graph, device.index)
    )
    arrays = {name: device.host_array((size, size), np.float32) for name in "xwy"}
    places = {name: device.allocate(array.nbytes, "the suite") for name, array in arrays.items()}
    binding = session.io_binding()
    for name, bind in (("x", binding.bind_input), ("w", binding.bind_input), ("y", binding.bind_output)):
        arrays[name][:] = draw.standard_normal((size, size)) if name != "y" else 0
        bind(name, "cuda", device.index, TensorProto.FLOAT, (size, size), places[name])
        device.upload(places[name], arrays[name])
    device.synchronize()
    session.run_with_iobinding(binding)
    device.download(arrays["y"], places["y"])
    device.synchronize()
    found = float(np.abs(arrays["y"] - arrays["x"] @ arrays["w"]).max())
    result.rows.append(Row("product of 64 by 64: max |Δ|", f"{found:.1e}", "1.0e-04", found <= 1e-4))
    for name in "xwy":
        device.free(places[name])
        device.free_host(arrays[name])


def _parity_cases(plan: Plan) -> list[Case]:
    return [Case(f"prompt {length}, {plan.steps} steps", (length,), plan.steps, (0,)) for length in plan.prompts]


def cuda_parity(suite: Suite, result: Result) -> None:
    suite.compare(result, "cuda", suite.plan.dense, _parity_cases(suite.plan))


def tensorrt_parity(suite: Suite, result: Result) -> None:
    plan = suite.plan
    for dtype in plan.dtypes:
        entry = suite.material.engine(plan.dense, dtype)[1]
        result.rows.append(
            Row(f"{dtype}: built by {entry['builder']} {entry['version']}", f"{entry['build']['seconds']:.0f} s")
        )
        suite.compare(result, "tensorrt", plan.dense, _parity_cases(plan), dtype)


class _Plain(TensorRTSession):
    """Every step is put on the stream, and none is captured."""

    def _capturable(self, context: Any) -> bool:
        return False


def replay(suite: Suite, result: Result) -> None:
    """Replayed steps give the ids of steps that are not, also in buffers that were made anew."""
    for dtype in suite.plan.dtypes:
        artifact = read_artifact(suite.material.engine(suite.plan.dense, dtype)[0])
        with Engine(artifact, _Plain(artifact, choose_engine(artifact), Device())) as plain:
            expected = [plain.generate_ids(ids, suite.plan.steps) for ids in ([5, 6, 7], [8, 9])]
        with load(artifact.path, backend="tensorrt") as engine:
            found = [engine.generate_ids([5, 6, 7], suite.plan.steps)]
            session: Any = engine.session
            captured = session._graphs.get(1) is not None
            engine.reset()
            engine.prefill([[1, 2], [3, 4]])  # other slots, so other buffers
            for token in range(3):
                engine.decode([token, token])
            found.append(engine.generate_ids([8, 9], suite.plan.steps))
        same = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
        total = sum(map(len, expected))
        result.rows.append(Row(f"{dtype}: ids as without a graph", str(same), str(total), found == expected))
        result.rows.append(Row(f"{dtype}: decode is a CUDA graph", "yes" if captured else "the engine forbids it"))


def _both(suite: Suite, result: Result, source: str, cases: list[Case]) -> None:
    """Compare both backends, of those that this machine has."""
    lacks = []
    for backend in ("cuda", "tensorrt"):
        try:
            suite.compare(result, backend, source, cases)
        except Unavailable as lack:
            lacks.append(str(lack))
    if not result.rows:
        raise Unavailable("; ".join(lacks))


def long_run(suite: Suite, result: Result) -> None:
    steps = suite.plan.long_steps
    _both(suite, result, suite.plan.dense, [Case(f"prompt 17, {steps} steps", (17,), steps, (0,))])


def ragged_batch(suite: Suite, result: Result) -> None:
    prompts, idle = suite.plan.ragged, (0, 2, 3, 5)
    _both(suite, result, suite.plan.dense, [
        Case(f"ragged batch {prompts}", prompts, suite.plan.steps, (0,) * len(prompts)),
        Case(f"idle slots, batch {prompts}", prompts, suite.plan.steps, idle),
    ])  # fmt: skip


def eviction(suite: Suite, result: Result) -> None:
    plan, prompt = suite.plan, suite.plan.keep + suite.plan.spare + 8
    case = Case(f"keep window {plan.keep}, prompt {prompt}, {plan.steps} steps", (prompt, 9), plan.steps, (0, 0))
    _both(suite, result, suite.material.windowed(), [case])


def hybrid(suite: Suite, result: Result) -> None:
    cases = [*_parity_cases(suite.plan), Case("ragged batch", (9, 4), suite.plan.steps, (0, 2))]
    _both(suite, result, suite.plan.hybrid, cases)


def quantised(suite: Suite, result: Result) -> None:
    """Beside the portable graph of the same codes on the CPU, which was compared with the eager model."""
    plan = suite.plan
    for scheme in plan.schemes:
        directory = suite.material.engine(plan.dense, quantize=scheme)[0]
        case, sound = Case(f"prompt 17, {plan.steps} steps", (17,), plan.steps, (0,)), True
        rows, _ = suite.material.answers(plan.dense, case)
        with load(directory, backend="cpu") as cpu, load(directory, backend="tensorrt") as engine:
            verdict = compare(case, run_case(cpu, case, rows), run_case(engine, case, rows), ROUNDED_PRODUCTS_KL_LIMIT)
        sound = verdict.passed
        found, limit = f"{verdict.mean_kl:.1e}", f"{ROUNDED_PRODUCTS_KL_LIMIT:.0e}"
        result.rows.append(Row(f"tensorrt, {scheme}, {case.name}: mean KL from the CPU's graph", found, limit, sound))
        if not sound:
            suite.explain(result, directory, "tensorrt", None)


def memory_comes_back(suite: Suite, result: Result) -> None:
    with load(suite.material.engine(suite.plan.dense)[0], backend="tensorrt") as engine:
        session: Any = engine.session
        driver, length = session.device.driver, session.graph.max_length
        session.allocate(4, length)
        session.release()
        before = driver.cuMemGetInfo()[1]
        for _ in range(3):
            session.allocate(4, length)
            session.release()
        lost = before - driver.cuMemGetInfo()[1]
    result.rows.append(Row("bytes lost by three allocations", str(lost), "0", lost == 0))


def speed(suite: Suite, result: Result) -> None:
    """Batch 1, prompt 128: figures for the report, beside what the roofline predicts, and no limit."""
    plan, name = suite.plan, Device().name
    card = find_card(name)
    if card is None:
        result.rows.append(Row("the roofline's prediction", f"no figures of {name} are known"))
    for dtype in plan.dtypes:
        directory = suite.material.engine(plan.speed, dtype)[0]
        options = BenchOptions(backend="tensorrt", prompt_length=plan.prompt_length, new_tokens=plan.new_tokens)
        found = measure(directory, options, BaselineOptions(list(plan.baselines)))
        rate = found["decode_tokens_per_second"]
        result.rows.append(Row(f"{dtype}: decode, tokens/s", f"{rate:.0f}"))
        if card is not None:
            step = roofline(directory, context=plan.prompt_length + plan.new_tokens // 2)
            expected = step.tokens_per_second(card, PRECISIONS[dtype])
            where = f"at {SHARE:.0%} of the bandwidth of {card.name}"
            result.rows.append(Row(f"{dtype}: predicted {where}, tokens/s", f"{expected:.0f}"))
            result.rows.append(Row(f"{dtype}: measured over predicted", f"{rate / expected:.2f}"))
        for name, baseline in found["baselines"].items():
            words = baseline["failed"] if "failed" in baseline else f"{baseline['times_as_fast']:.2f}"
            result.rows.append(Row(f"{dtype}: times {name}'s tokens/s", words))


FIRST, KERNEL, CUDA, TENSORRT = "device and versions", "one kernel", "ONNX Runtime on CUDA", "TensorRT engines"
STAGES = (
    Stage(FIRST, memory_and_copies),
    Stage(KERNEL, one_kernel, (FIRST,)),
    Stage(CUDA, cuda_parity, (FIRST, KERNEL)),
    Stage(TENSORRT, tensorrt_parity, (FIRST,)),
    Stage("CUDA graph replay", replay, (FIRST, TENSORRT)),
    Stage("many steps", long_run, (FIRST,)),
    Stage("ragged batches", ragged_batch, (FIRST,)),
    Stage("window eviction", eviction, (FIRST,)),
    Stage("Cheems", hybrid, (FIRST,)),
    Stage("quantised engines", quantised, (FIRST, TENSORRT)),
    Stage("memory", memory_comes_back, (FIRST, TENSORRT)),
    Stage("speed", speed, (FIRST, TENSORRT)),
)
