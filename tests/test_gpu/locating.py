"""Which tensor of a graph is the first that a backend computes wrongly.

Every module of the eager model that gives one value a token has a value in the graph. The graph is run with one of them
as an output besides its own, and a bisection over them in the graph's order finds the first that differs. For each an
engine is built anew, since each output changes what a builder fuses.

B batch (slots), S new tokens, R rows of logits, D values of a token.
"""

import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from export.rewrites.names import MODULE
from export.targets.tensorrt import TensorRTOptions, add_engine
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import ELEMENTS, LOGITS_INDEX, Artifact, Graph
from runtime.backends.arrays import STORAGE, widened
from runtime.backends.cuda import Device
from runtime.backends.ort_gpu import OnnxGpuSession
from runtime.backends.tensorrt import TensorRTSession, choose_engine
from runtime.backends.tensorrt_entry import EngineFile

KINDS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
LIMITS = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1.5e-1}  # of the largest value of a sound tensor
Answers = dict[str, np.ndarray]  # (S, D) of each module, by its path


@dataclass(frozen=True)
class Place:
    """A value (B, S, D) of the graph, or (B, R, D) of those with logits, and the modules whose output it is."""

    value: str
    modules: tuple[str, ...]
    operator: str
    width: int
    dtype: str
    every_token: bool


def places(graph: ir.Graph) -> list[Place]:
    """Those of the graph, in its order."""
    last: dict[str, ir.Node] = {}
    for node in graph:
        parts = node.metadata_props.get(MODULE, "").split(".")
        last |= {".".join(parts[:end]): node for end in range(1, len(parts) + 1)}
    found = []
    for node in graph:
        modules = tuple(sorted((name for name, each in last.items() if each is node), key=len, reverse=True))
        value = node.outputs[0]
        shape = list(value.shape or ())
        if modules and len(shape) == 3 and isinstance(shape[2], int) and value.dtype in KINDS:
            every = str(shape[1]) == "sequence"
            found.append(Place(value.name or "", modules, node.op_type, shape[2], KINDS[value.dtype], every))
    return found


def eager_answers(model: Any, ids: np.ndarray) -> Answers:
    """Each module's output for ids (S,), by one pass of the eager model on the CPU."""
    answers: Answers = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 3 and output.shape[:2] == (1, ids.size):
                answers[path] = output[0].float().numpy()

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules()]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(ids)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return answers


def cpu_answers(artifact: Artifact, ids: np.ndarray) -> Answers:
    """The same by the portable graph in ONNX Runtime on the CPU, for a model whose weights the graph alone has."""
    with _with_output(
        artifact, [place.value for place in places(ir.load(artifact.path / artifact.graph.file).graph)]
    ) as (
        tried,
        found,
    ):
        session = onnxruntime.InferenceSession(tried.path / tried.graph.file, providers=["CPUExecutionProvider"])
        graph = tried.graph
        lengths = dict.fromkeys(graph.inputs[1:], np.zeros(1, np.int64)) | {graph.inputs[2]: np.array([ids.size])}
        if graph.indexed:
            lengths[LOGITS_INDEX] = np.array([[ids.size - 1]])
        rows = graph.rows(next(size for size in graph.capacities if size >= ids.size))
        feed = {state.input: np.zeros(state.sized(1, rows), STORAGE[state.dtype]) for state in graph.states}
        arrays = session.run([place.value for place in found], {"input_ids": ids[None], **lengths, **feed})
    return {place.modules[0]: array[0] for place, array in zip(found, arrays, strict=True)}


def first_difference(artifact: Artifact, backend: str, answers: Answers, chunks: list[np.ndarray]) -> str:
    """Where `backend` first differs from the answers for the tokens of the last of `chunks`, which go in one by one."""
    known = []
    for place in places(ir.load(artifact.path / artifact.graph.file).graph):
        named = [name for name in place.modules if name in answers and answers[name].shape[1] == place.width]
        if named:
            known.append((place, answers[named[0]]))
    what = f"{backend}, {artifact.graph.dtype}, chunks of {', '.join(str(chunk.size) for chunk in chunks)} tokens"
    seen: dict[int, tuple[float, float]] = {}

    def differs(index: int) -> bool:
        place, expected = known[index]
        found = _run(artifact, backend, place, chunks)
        wanted = expected[-len(found) :]
        size = float(np.abs(wanted).max())
        seen[index] = float(np.abs(found - wanted).max(initial=0.0)) if np.isfinite(found).all() else np.nan, size
        return not seen[index][0] <= LIMITS[artifact.graph.dtype] * max(size, 1e-3)

    if not differs(len(known) - 1):
        return f"{what}: {known[-1][0].value} and all before it agree; what fails lies between steps"
    at = bisect_left(range(len(known) - 1), True, key=differs)
    place = known[at][0]
    before = f"{known[at - 1][0].value} agrees" if at else "nothing before it is compared"
    return (
        f"{what}: the first tensor that differs is {place.value} (operator {place.operator}, module "
        f"{place.modules[0]}): max |Δ| {seen[at][0]:.2e} of {seen[at][1]:.2e}; {before}; {len(known)} tensors in all"
    )


def _run(artifact: Artifact, backend: str, place: Place, chunks: list[np.ndarray]) -> np.ndarray:
    """The value (S or 1, D) for the last chunk, float32."""
    with _with_output(artifact, [place.value]) as (tried, _):
        if backend == "tensorrt":
            session: Any = _ProbedEngine(tried, _built(tried), Device())
        else:
            session = _ProbedGraph(tried, "cuda", Device())
        try:
            session.place = place
            total = sum(chunk.size for chunk in chunks)
            session.allocate(1, next(size for size in session.graph.capacities if size >= total))
            held = 0
            for chunk in chunks:
                session.step(chunk[None], np.array([held]), np.array([chunk.size]))
                held += chunk.size
            return session.read(chunks[-1].size)
        finally:
            session.close()


def _built(artifact: Artifact) -> EngineFile:
    """An engine of the artifact's graph, as large as the one that it replaces."""
    old = choose_engine(artifact)
    options = TensorRTOptions(old.builder, max_batch=old.max_batch, max_length=old.capacity)
    entry = add_engine(artifact, old.builder, [], options)
    artifact.folder.forget([old.file])
    return msgspec.convert(entry, EngineFile)


@contextmanager
def _with_output(artifact: Artifact, values: list[str]) -> Iterator[tuple[Artifact, list[Place]]]:
    """A copy of the artifact whose graph gives these values too, and their places."""
    with tempfile.TemporaryDirectory() as root:
        copy = read_artifact(Path(shutil.copytree(artifact.path, Path(root, "probe"))), allow_unverified=True)
        model = ir.load(copy.path / copy.graph.file)
        found = [place for place in places(model.graph) if place.value in values]
        named = {value.name: value for node in model.graph for value in node.outputs}
        given = {value.name for value in model.graph.outputs}
        model.graph.outputs.extend(named[name] for name in values if name not in given)
        (copy.path / "probe.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
        graph: Graph = replace(copy.graph, file="probe.onnx", cpu_file="probe.onnx")
        yield replace(copy, graph=graph), found


class _Probed:
    """A session that keeps one value more of each step on the device."""

    place: Place
    addresses: dict[str, int]
    device: Device
    chunk: int

    def sizes(self, batch: int, capacity: int) -> dict[str, int]:
        own = batch * self.chunk * self.place.width * np.dtype(STORAGE[self.place.dtype]).itemsize
        return {self.place.value: own, **super().sizes(batch, capacity)}  # type: ignore[misc]

    def read(self, length: int) -> np.ndarray:
        """The value (S or 1, D), float32, of the only slot."""
        shape = (length if self.place.every_token else 1, self.place.width)
        array = self.device.host_array(shape, STORAGE[self.place.dtype])
        self.device.download(array, self.addresses[self.place.value])
        self.device.synchronize()
        found = widened(array, self.place.dtype).astype(np.float32)
        self.device.free_host(array)
        return found


class _ProbedGraph(_Probed, OnnxGpuSession):
    def _bind(self, length: int, rows: int) -> Any:
        binding, place = super()._bind(length, rows), self.place
        shape = (self.batch, length if place.every_token else rows, place.width)
        if place.value != "logits":
            address = self.addresses[place.value]
            binding.bind_output(place.value, "cuda", self.device.index, ELEMENTS[place.dtype], shape, address)
        return binding


class _ProbedEngine(_Probed, TensorRTSession):
    def _bind(self, context: Any, length: int) -> None:
        super()._bind(context, length)
        self._set(context, self.place.value, self.addresses[self.place.value])
