"""graph → engine: the step graph made fit for TensorRT, built by its own builder, and its layers counted.

An engine has one capacity, and a profile each for decode (S = 1) and for prefill (longer chunks). In its network every
TensorScatter is one KV-cache-update layer, in place; every Attention one attention layer, fused where the builder has a
kernel for it; every RotaryEmbedding a layer of its own. Whatever breaks that, or the builder refuses, fails the export.

B batch, S new tokens, C cache capacity, V vocabulary.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.errors import ExportError, VerificationError
from export.package.directory import MODULE, check_free, replacing, write_manifest
from export.targets.onnx_graph import DTYPES, export_onnx
from export.verification.compare import Comparison, worst
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, NEXT_IDS, Artifact
from runtime.backends.cuda import Device, gpu_count
from runtime.backends.tensorrt_editions import MODULES, how_to_install, import_builder, installed

BUILDERS = ("auto", *MODULES)
CHUNK = 512
# What an engine of tensorrt-rtx runs on where no target is named (its documentation); later GPUs too.
RTX_DEFAULTS = ("8.0", "8.6", "8.9", "12.0")


def build_tensorrt(
    source: str | Path,
    out: str | Path,
    *,
    builder: str = "auto",
    dtype: str | None = None,
    max_batch: int | None = None,
    max_length: int | None = None,
    chunk: int = CHUNK,
    compute_capability: Sequence[str] = (),
    seed: int = 0,
    force: bool = False,
    stage: Callable[[str], None] = lambda name: None,
    report: Callable[[Comparison], None] = lambda verdict: None,
) -> dict[str, Any]:
    """Write the artifact directory `out`: the ONNX artifact of `source`, and an engine for it beside the graph.

    `source` is an artifact, which is copied, or what `export_onnx` takes: a checkpoint directory or a preset's name.
    `builder`: "tensorrt", which needs a GPU, "tensorrt-rtx", which does not, or "auto", the first that can work here.
    `dtype`: fp32 (the default), fp16 or bf16; of an artifact, its own. `max_batch` slots (default 8) of `max_length`
    tokens (default: all that the model allows) are the engine's bounds, at most an artifact's own. `chunk`: the most
    tokens a slot takes in one step. `compute_capability`: the GPUs to build for, as "8.9"; the default is the builder's
    own: the GPU at hand, or every one that tensorrt-rtx supports from 8.0 on.

    Returns the engine's entry in the manifest. Raises `ExportError`, which has the builder's words where it refuses,
    `VerificationError` where the ONNX graph is not the eager model's, and what `export_onnx` raises.
    """
    source, out = os.fspath(source), Path(out)
    builder = choose_builder(builder)
    capabilities = [check_capability(builder, name) for name in compute_capability]
    if chunk < 2:
        raise ExportError(f"--chunk is {chunk}; expected at least 2")
    check_free(out, force)
    with replacing(out, force) as directory:
        if (Path(source) / MANIFEST).is_file():
            _copy_artifact(Path(source), directory, dtype, stage)
        else:
            inner = directory / "onnx"  # not the directory itself, which this process holds locked
            verdicts = export_onnx(
                source, inner, dtype=dtype or "fp32", max_length=max_length, max_batch=max_batch or 8, seed=seed,
                stage=stage, report=report,
            )  # fmt: skip
            if not all(verdict.passed for verdict in verdicts):
                raise VerificationError(f"{source}: {worst(verdicts)}; no engine is built of such a graph")
            for path in inner.iterdir():
                path.rename(directory / path.name)
            inner.rmdir()
        artifact = read_artifact(directory, allow_unverified=True)
        entry = add_engine(artifact, builder, max_batch, max_length, chunk, capabilities, stage)
        manifest = json.loads((directory / MANIFEST).read_text())
        others = [engine for engine in manifest.get("engines", []) if engine["file"] != entry["file"]]
        kept = {key: value for key, value in manifest.items() if key not in ("files", "verified")}
        write_manifest(directory, {**kept, "engines": [*others, entry]}, manifest["verified"])
    return entry


def choose_builder(builder: str) -> str:
    """The edition of TensorRT to build with; the one place where it is decided. Raises `ExportError`."""
    if builder not in BUILDERS:
        raise ExportError(f"--builder is {builder!r}; expected one of {', '.join(BUILDERS)}")
    if builder == "auto":
        builder = "tensorrt" if installed("tensorrt") and gpu_count() else "tensorrt-rtx"
    if not installed(builder):
        raise ExportError(f"{builder} is not installed; {how_to_install(builder)}")
    if builder == "tensorrt" and not gpu_count():
        raise ExportError("--builder tensorrt needs a GPU, its driver and cuda-python; tensorrt-rtx builds without")
    return builder


def check_capability(builder: str, name: str) -> str:
    """The builder's name of the compute capability "8.9". Raises `ExportError` for one that it has no code for."""
    if builder == "tensorrt":
        raise ExportError(
            "--compute-capability: tensorrt builds for the GPU at hand; --builder tensorrt-rtx can choose"
        )
    module = import_builder(builder)
    known = {
        f"{member[2:-1]}.{member[-1]}": member
        for member in module.ComputeCapability.__members__
        if member.startswith("SM")
    }
    if name not in known:
        raise ExportError(
            f"--compute-capability {name}: tensorrt-rtx {module.__version__} builds for {', '.join(known)}"
        )
    return known[name]


def add_engine(
    artifact: Artifact, builder: str, max_batch: int | None, max_length: int | None, chunk: int,
    capabilities: Sequence[str], stage: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Build an engine into an artifact's directory, with its log; returns its entry, which no manifest has yet."""
    graph = artifact.graph
    batch, capacity = max_batch or graph.max_batch, max_length or graph.max_length
    for option, value, most in (("--max-batch", batch, graph.max_batch), ("--max-length", capacity, graph.max_length)):
        if not 1 <= value <= most:
            raise ExportError(f"{option} is {value}; {artifact.path} allows 1 to {most}")
    if capacity < 2:
        raise ExportError(f"--max-length is {capacity}; expected at least 2")
    chunk, rows = min(chunk, capacity, graph.chunk), graph.rows(capacity)
    stage("making the graph fit for TensorRT")
    model = ir.load(artifact.path / graph.file)
    modules = {node.name or "": node.metadata_props.get(MODULE, "") for node in model.graph}
    expected = {kind: _names(model, kind) for kind in ("TensorScatter", "Attention", "RotaryEmbedding")}
    specialise(model, rows, {state.input for state in graph.states if "capacity" in state.shape})
    specialised = artifact.path / ".specialised.onnx"  # beside the weights that it refers to
    specialised.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    stem = f"model.{builder}"
    # Where there are few heads the builder has no fused kernel for exactly one token, but one for one or two.
    decode = [{"name": "decode", "batch": [1, 1, batch], "sequence": [1, 1, most]} for most in (1, 2)]
    prefill = {"name": "prefill", "batch": [1, 1, batch], "sequence": [2, min(128, chunk), chunk]}
    built = run_builder(
        {
            "module": MODULES[builder],
            "model": str(specialised),
            "engine": str(artifact.path / f"{stem}.engine"),
            "log": str(artifact.path / f"{stem}.log"),
            "profiles": [decode, [prefill]],
            "capabilities": list(capabilities),
        },
        builder, modules, stage,
    )  # fmt: skip
    specialised.unlink()
    caches = {state.output: state.input for state in graph.states}
    check_layers(built, expected, caches, modules)
    aliased = [cache["output"] for cache in built["caches"]]
    return {
        "file": f"{stem}.engine",
        "log": f"{stem}.log",
        "builder": builder,
        "version": built["version"],
        "compute_capabilities": _targets(builder, capabilities),
        "capacity": capacity,
        "max_batch": batch,
        "profiles": built["profiles"],
        "aliased": aliased,
        "layers": {
            "counts": built["counts"],
            "cache_updates": [{"module": modules[c["name"]], **c} for c in built["caches"]],
            "attention": [{"module": modules[a["name"]], **a} for a in built["attention"]],
            "rotary": [{"module": modules[name], "name": name} for name in built["rotary"]],
        },
        "build": {key: built[key] for key in ("bytes", "seconds", "peak_bytes")},
    }


def _targets(builder: str, capabilities: Sequence[str]) -> list[str]:
    if builder == "tensorrt":
        return [Device().capability]
    return [f"{member[2:-1]}.{member[-1]}" for member in capabilities] or list(RTX_DEFAULTS)


def _names(model: ir.Model, operator: str) -> list[str]:
    return [node.name or "" for node in model.graph if node.op_type == operator]


def check_layers(
    built: dict[str, Any], expected: dict[str, list[str]], caches: dict[str, str], modules: dict[str, str]
) -> None:
    """Raise `ExportError` unless every operator that matters became the layer that it should."""
    updates = built["caches"]
    found = {
        "TensorScatter": [update["name"] for update in updates],
        "Attention": [attention["name"] for attention in built["attention"]],
        "RotaryEmbedding": built["rotary"],
    }
    for operator, names in expected.items():
        lost = sorted(set(names) - set(found[operator]))
        if lost or len(names) != len(found[operator]):
            name = lost[0] if lost else names[0]
            raise ExportError(
                f"TensorRT made {len(found[operator])} layers of {len(names)} {operator} nodes; "
                f"{name} of {modules[name]} has none of its own"
            )
    for update in updates:
        if caches.get(update["output"]) != update["input"]:
            raise ExportError(
                f"TensorRT's cache update {update['name']} writes {update['input']} to {update['output']}; "
                f"expected {caches.get(update['output'])}, so that it is in place"
            )


def specialise(model: ir.Model, capacity: int, caches: Iterable[str]) -> None:
    """Rewrite the portable graph, in place, for an engine of one capacity.

    TensorRT wants a cache's length fixed. Sampling wants the likeliest token on the device: the output `next_ids`.
    """
    graph, caches = model.graph, set(caches)
    for value in [*graph.inputs, *graph.outputs]:
        if (value.name or "").removesuffix(".out") in caches:
            assert value.shape is not None
            value.shape = ir.Shape([dim if index != 2 else capacity for index, dim in enumerate(value.shape)])
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.shape = None  # it may speak of the dynamic capacity; the parser infers it again
    part_positions(graph, capacity)
    add_next_ids(graph)


def part_positions(graph: ir.Graph, capacity: int) -> None:
    """Count the positions of rotary embeddings apart from those of the mask.

    Where both come of one Range, TensorRT-RTX 1.7's compiler crashes on float16 attention. The copy counts by a slice
    of a constant, which the compiler does not recognise as the same thing.
    """
    angles = [node for node in graph if node.op_type in ("Cos", "Sin")]
    waiting, above = list(angles), set()
    while waiting:
        node = waiting.pop()
        if node not in above:
            above.add(node)
            waiting += [maker for value in node.inputs if value is not None and (maker := value.producer())]
    copies: dict[ir.Value, ir.Value] = {}
    count = _constant(graph, "tensorrt.positions", np.arange(capacity))
    zero = _constant(graph, "tensorrt.zero", np.array([0]))
    for node in [node for node in graph if node in above]:
        inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
        new: list[ir.Node] = []
        if node.op_type == "Range":
            end = ir.node("Unsqueeze", [node.inputs[1], zero], name=f"{node.name}.end")
            new = [end, ir.node("Slice", [count, zero, end.outputs[0]], name=f"{node.name}.rotary")]
        elif node in angles:
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
        elif any(value in copies for value in node.inputs if value is not None):
            new = [ir.node(node.op_type, inputs, node.attributes, name=f"{node.name}.rotary")]
        if new:
            for made in new:
                made.outputs[0].name = made.name
            graph.insert_before(node, new)
            copies[node.outputs[0]] = new[-1].outputs[0]


def add_next_ids(graph: ir.Graph) -> None:
    """The output `next_ids`: the likeliest token of each row of the logits, or -1 where they are not all finite."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    last, negative = _constant(graph, "tensorrt.last", np.array([2])), _constant(graph, "tensorrt.none", np.array(-1))
    wide = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    total = ir.node("ReduceSum", [wide.outputs[0], last], {"keepdims": 0})
    missing = ir.node("IsNaN", [total.outputs[0]])
    endless = ir.node("IsInf", [total.outputs[0]])
    broken = ir.node("Or", [missing.outputs[0], endless.outputs[0]])
    best = ir.node("ArgMax", [wide.outputs[0]], {"axis": 2, "keepdims": 0})
    assert logits.shape is not None
    ids = ir.Value(name=NEXT_IDS, shape=ir.Shape(logits.shape[:2]), type=ir.TensorType(ir.DataType.INT64))
    choice = ir.node("Where", [broken.outputs[0], negative, best.outputs[0]], outputs=[ids])
    for node in (wide, total, missing, endless, broken, best, choice):
        node.name = f"tensorrt.{node.op_type.lower()}"
        if not node.outputs[0].name:
            node.outputs[0].name = node.name
        graph.append(node)
    graph.outputs.append(ids)


def _constant(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    tensor = ir.tensor(value.astype(np.int64), name=name)
    made = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.register_initializer(made)
    return made


def run_builder(
    order: dict[str, Any], builder: str, modules: dict[str, str], stage: Callable[[str], None]
) -> dict[str, Any]:
    """Run the builder's program on `order`, passing its progress on. Raises `ExportError` where it refuses or dies."""
    program = Path(__file__).with_name("tensorrt_program.py")
    read, write = os.pipe()
    # Not run as a file: that would put this folder before every package.
    command = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", program]
    with open(order["log"], "w") as log, open(read) as events:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write])
        finally:
            os.close(write)
        last: dict[str, Any] = {}
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "events": write}).encode())
            process.stdin.close()
            for line in events:
                last = json.loads(line)
                if "progress" in last:
                    stage(f"{builder}: {last['progress']}")
        finally:
            if "built" not in last and "refused" not in last:
                process.kill()
            process.wait()
    if "built" in last:
        return last["built"]
    if "refused" in last:
        named = [f"{name} of {modules[name]}" for name in last["nodes"] if name in modules]
        where = f"node {', '.join(named[:3])}: " if named else ""
        raise ExportError(f"{builder} refuses this model: {where}{last['refused']}")
    tail = Path(order["log"]).read_text(errors="replace").strip().splitlines()[-1:]
    raise ExportError(
        f"{builder} died while building (exit code {process.returncode}); the last line of its log: "
        f"{tail[0] if tail else 'none'}"
    )


def _copy_artifact(source: Path, directory: Path, dtype: str | None, stage: Callable[[str], None]) -> None:
    """The artifact's listed files and its manifest, after they were checked."""
    stage("reading the artifact")
    artifact = read_artifact(source)
    if dtype is not None and str(DTYPES.get(dtype)).removeprefix("torch.") != artifact.graph.dtype:
        raise ExportError(f"--dtype is {dtype}, but {source} is {artifact.graph.dtype}; export the checkpoint again")
    for name in (*artifact.files, MANIFEST):
        shutil.copy2(source / name, directory / name)
