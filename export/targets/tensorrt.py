"""The target `tensorrt`: an ONNX artifact, and beside its graph an engine that TensorRT's own builder made of it.

An engine has one capacity, and a profile each for decode (S = 1) and for prefill (longer chunks). In its network every
TensorScatter is one KV-cache-update layer, in place; every Attention one attention layer, fused where the builder has a
kernel for it; every RotaryEmbedding a layer of its own, and so is every DequantizeLinear, over its weight's codes.
Where that does not hold, or the builder refuses, the export fails.

B batch (slots), S new tokens, C cache capacity, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.errors import ExportError, VerificationError
from export.package.manifest import write_manifest
from export.progress import SILENT, Progress
from export.rewrites.fixed_capacity import fix_capacity
from export.rewrites.last_row import take_last_row
from export.rewrites.names import MODULE
from export.rewrites.narrow_float64 import narrow_float64
from export.rewrites.next_ids import add_next_ids
from export.rewrites.rotary_positions import separate_rotary_positions
from export.targets.base import Draft, Table, Target, check_float_caches, write_verified
from export.targets.onnx_artifact import DTYPES, ONNX, OnnxOptions
from export.targets.tensorrt_builder import check_layers, run_builder
from export.verification.comparison import worst
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, Artifact, Graph, Manifest, parse_manifest
from runtime.backends.cuda import Device, gpu_count
from runtime.backends.tensorrt_editions import (
    MODULES,
    how_to_install,
    import_builder,
    installed,
    later_than,
    rtx_capabilities,
)
from runtime.backends.tensorrt_entry import ENGINES
from runtime.console import option

BUILDERS = ("auto", *MODULES)
LAYERS = (
    "TensorScatter",
    "Attention",
    "RotaryEmbedding",
    "DequantizeLinear",
)  # the operators that must become a layer each
FLOAT_CACHES = "TensorRT's cache update takes float32, float16 and bfloat16"
# What an engine of tensorrt-rtx runs on where no target is named (its documentation); later GPUs too.
RTX_DEFAULTS = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class TensorRTOptions:
    """What a TensorRT engine is to be. `max_batch` and `max_length` are at most an artifact's own, where it is of one.

    Raises `ExportError` for a value that no engine can have.
    """

    builder: str = option("auto", f"{', '.join(BUILDERS)}; tensorrt needs a GPU, tensorrt-rtx needs none.")
    dtype: str | None = option(None, f"{', '.join(DTYPES)}. Default: fp32, or the artifact's.")
    max_batch: int | None = option(None, "Most slots a step serves. Default: 8, or as exported.")
    max_length: int | None = option(None, "Tokens a slot holds. Default: as many as it can.")
    chunk: int = option(512, "Most tokens a slot takes in one step.")
    compute_capability: str = option(
        "", "GPUs to build for, as 8.6,8.9. Default: all from 8.0 on, or the GPU of this machine."
    )

    def __post_init__(self) -> None:
        if self.builder not in BUILDERS:
            raise ExportError(f"--builder is {self.builder!r}; expected one of {', '.join(BUILDERS)}")
        if self.chunk < 2:
            raise ExportError(f"--chunk is {self.chunk}; expected at least 2")


class TensorRTTarget(Target[TensorRTOptions]):
    """The engine's layers are checked, and the graph that it was built of is compared in ONNX Runtime.

    The engine itself is not compared with the eager model, since that needs a GPU.
    """

    name = "tensorrt"
    help = "Build a TensorRT engine into an artifact, and check its layers."
    options = TensorRTOptions
    source_help = f"{Target.source_help[:-1]}; or an artifact, which is copied."

    def write(self, draft: Draft, options: TensorRTOptions) -> None:
        """Copy the source where it is an artifact, else export and compare it; then add an engine and its log.

        Raises `VerificationError` where the ONNX graph is not the eager model's.
        """
        builder = choose_builder(options.builder, here=not options.compute_capability)
        names = [name for name in options.compute_capability.split(",") if name]
        capabilities = [check_capability(builder, name) for name in names]
        source = Path(draft.source)
        if (source / MANIFEST).is_file():
            copy_artifact(draft, options.dtype)
        else:
            onnx = OnnxOptions(options.dtype or "fp32", max_length=options.max_length, max_batch=options.max_batch or 8)
            comparisons = write_verified(ONNX, draft, onnx)
            if not all(comparison.passed for comparison in comparisons):
                raise VerificationError(f"{draft.source}: {worst(comparisons)}; no engine is built of such a graph")
        artifact = read_artifact(draft.directory, allow_unverified=True)
        check_float_caches(artifact.graph, draft.source, FLOAT_CACHES)
        entry = add_engine(artifact, builder, capabilities, options, draft.progress)
        others = draft.manifest.sections.get(ENGINES, [])
        draft.add_section(ENGINES, [*(each for each in others if each["file"] != entry["file"]), entry])

    def tables(self, manifest: Manifest) -> list[Table]:
        """Of each engine its profiles, with the attention layers that are fused in them, and its layers by kind."""
        return [table for engine in manifest.sections.get(ENGINES, []) for table in _tables(engine)]

    def summary(self, directory: Path, manifest: Manifest) -> list[str]:
        """A line for each profile of the engine that was built, and one on the engine."""
        engine = manifest.sections[ENGINES][-1]
        layers, build = engine["layers"], engine["build"]
        lines = []
        for index, profile in enumerate(engine["profiles"]):
            lines.append(
                f"{profile['name']}: batch 1 to {profile['batch'][2]}, {profile['sequence'][0]} to "
                f"{profile['sequence'][2]} tokens, attention fused in {_fused(layers, index)} of "
                f"{len(layers['attention'])} layers"
            )
        return [
            *lines,
            f"built: {directory / engine['file']}: {engine['builder']} {engine['version']} for compute capability "
            f"{', '.join(engine['compute_capabilities'])}; {build['bytes'] / 1e6:.0f} MB in {build['seconds']:.1f} s "
            f"and {build['peak_bytes'] / 1e9:.1f} GB; {len(layers['cache_updates'])} caches updated in place, "
            f"{len(layers['rotary'])} rotary layers",
        ]


TENSORRT = TensorRTTarget()


def choose_builder(builder: str, here: bool = True) -> str:
    """The edition of TensorRT to build with; the one place where it is decided. Raises `ExportError`.

    `here`: no GPUs are named to build for, so that "auto" must find an edition that this machine's GPU can run.
    """
    automatic = builder == "auto"
    if automatic:
        builder = "tensorrt" if installed("tensorrt") and gpu_count() else "tensorrt-rtx"
    if not installed(builder):
        raise ExportError(f"{builder} is not installed; {how_to_install(builder)}")
    if automatic and here and builder == "tensorrt-rtx" and gpu_count():
        _check_code_for(Device())
    if builder == "tensorrt" and not gpu_count():
        raise ExportError("--builder tensorrt needs a GPU, its driver and cuda-python; tensorrt-rtx builds without")
    return builder


def _check_code_for(device: Device) -> None:
    """Raise `ExportError` where tensorrt-rtx has no code for a GPU."""
    known = rtx_capabilities(import_builder("tensorrt-rtx"))
    if device.capability not in known and not later_than(device.capability, known):
        raise ExportError(
            f"{device.name} has compute capability {device.capability}, and tensorrt-rtx builds for "
            f"{', '.join(known)}; {how_to_install('tensorrt')}, or name other GPUs with --compute-capability"
        )


def check_capability(builder: str, name: str) -> str:
    """The builder's name of the compute capability "8.9". Raises `ExportError` for one that it has no code for."""
    if builder == "tensorrt":
        raise ExportError(
            "--compute-capability: tensorrt builds for the GPU at hand; --builder tensorrt-rtx can choose"
        )
    module = import_builder(builder)
    known = rtx_capabilities(module)
    if name not in known:
        raise ExportError(
            f"--compute-capability {name}: tensorrt-rtx {module.__version__} builds for {', '.join(known)}; for "
            "another GPU build on a machine that has it, with --builder tensorrt"
        )
    return known[name]


def _targets(builder: str, capabilities: Sequence[str]) -> list[str]:
    if builder == "tensorrt":
        return [Device().capability]
    return [f"{member[2:-1]}.{member[-1]}" for member in capabilities] or list(RTX_DEFAULTS)


def prepare_for_tensorrt(model: ir.Model, graph: Graph, capacity: int) -> None:
    """Rewrite the portable graph, in place, for an engine of one capacity. Its rows are the graph's for it."""
    narrow_float64(model)
    take_last_row(model.graph)
    rows = graph.rows(capacity)
    fix_capacity(model.graph, rows, [state.input for state in graph.states if "capacity" in state.shape])
    separate_rotary_positions(model.graph, rows)
    add_next_ids(model.graph)


def add_engine(
    artifact: Artifact, builder: str, capabilities: Sequence[str], options: TensorRTOptions, progress: Progress = SILENT
) -> dict[str, Any]:
    """Build an engine into an artifact's directory, with its log; returns its entry, which no manifest has yet."""
    graph = artifact.graph
    batch, capacity = _checked_bounds(artifact, options)
    progress.stage("rewriting the graph for TensorRT")
    model = ir.load(artifact.path / graph.file)
    modules = {node.name or "": node.metadata_props.get(MODULE, "") for node in model.graph}
    expected = {kind: [node.name or "" for node in model.graph if node.op_type == kind] for kind in LAYERS}
    prepare_for_tensorrt(model, graph, capacity)
    stem = f"model.{builder}"
    rewritten = artifact.path / f"{stem}.onnx"  # stays: trtexec builds of it too
    rewritten.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    order = {
        "module": MODULES[builder],
        "model": str(rewritten),
        "engine": str(artifact.path / f"{stem}.engine"),
        "log": str(artifact.path / f"{stem}.log"),
        "profiles": _profiles(batch, min(options.chunk, capacity, graph.chunk)),
        "capabilities": list(capabilities),
    }
    built = run_builder(order, builder, modules, progress)
    check_layers(built, expected, {state.output: state.input for state in graph.states}, modules)
    return {
        "file": f"{stem}.engine",
        "log": f"{stem}.log",
        "builder": builder,
        "version": built["version"],
        "compute_capabilities": _targets(builder, capabilities),
        "capacity": capacity,
        "max_batch": batch,
        "profiles": built["profiles"],
        "aliased": [cache["output"] for cache in built["caches"]],
        "layers": {
            "counts": built["counts"],
            "cache_updates": [{"module": modules[c["name"]], **c} for c in built["caches"]],
            "attention": [{"module": modules[a["name"]], **a} for a in built["attention"]],
            "quantised": [{"module": modules[q["name"]], **q} for q in built["quantised"]],
            "rotary": [{"module": modules[name], "name": name} for name in built["rotary"]],
        },
        "build": {key: built[key] for key in ("bytes", "seconds", "peak_bytes")},
    }


def _checked_bounds(artifact: Artifact, options: TensorRTOptions) -> tuple[int, int]:
    """The engine's slots and its capacity. Raises `ExportError` beyond the artifact's own."""
    graph = artifact.graph
    batch, capacity = options.max_batch or graph.max_batch, options.max_length or graph.max_length
    for name, value, most in (("--max-batch", batch, graph.max_batch), ("--max-length", capacity, graph.max_length)):
        if not 1 <= value <= most:
            raise ExportError(f"{name} is {value}; {artifact.path} allows 1 to {most}")
    if capacity < 2:
        raise ExportError(f"--max-length is {capacity}; expected at least 2")
    return batch, capacity


def _profiles(batch: int, chunk: int) -> list[list[dict[str, Any]]]:
    """The bounds of decode and of prefill, each as alternatives: the builder takes the one with most fused layers.

    Where there are few heads the builder has no fused kernel for exactly one token, but one for one or two.
    """
    decode = [{"name": "decode", "batch": [1, 1, batch], "sequence": [1, 1, most]} for most in (1, 2)]
    prefill = {"name": "prefill", "batch": [1, 1, batch], "sequence": [2, min(128, chunk), chunk]}
    return [decode, [prefill]]


def copy_artifact(draft: Draft, dtype: str | None) -> Artifact:
    """Copy the files that the source, an artifact, lists, after they were checked, and take its manifest over."""
    draft.progress.stage("reading the artifact")
    source = Path(draft.source)
    artifact = read_artifact(source)
    if dtype is not None and str(DTYPES.get(dtype)).removeprefix("torch.") != artifact.graph.dtype:
        raise ExportError(f"--dtype is {dtype}, but {source} is {artifact.graph.dtype}; export the checkpoint again")
    draft.manifest = parse_manifest(artifact.manifest, source / MANIFEST)
    for name in artifact.files:
        artifact.copy_file(name, draft.directory / name)
    artifact.folder.check_unchanged()
    write_manifest(draft.directory, draft.manifest, verified=True)
    return artifact


def _fused(layers: dict[str, Any], profile: int) -> int:
    """How many attention layers are fused in the profile of this index."""
    return sum(layer["fused"][profile] for layer in layers["attention"])


def _tables(engine: dict[str, Any]) -> list[Table]:
    layers = engine["layers"]
    title = (
        f"{engine['file']}: {engine['builder']} {engine['version']}, {engine['capacity']} tokens in each of "
        f"{engine['max_batch']} slots, compute capability {', '.join(engine['compute_capabilities'])}"
    )
    rows = [
        [
            profile["name"],
            " to ".join(str(size) for size in profile["sequence"][::2]),
            f"{_fused(layers, index)} of {len(layers['attention'])}",
        ]
        for index, profile in enumerate(engine["profiles"])
    ]
    counts = [[kind, str(count)] for kind, count in layers["counts"].items()]
    tables = [
        Table(title, ["profile", "tokens a step", "attention fused"], rows),
        Table(f"Layers of {engine['file']}", ["layer", "count"], counts),
    ]
    quantised = [[weight["module"], weight["name"], weight["type"]] for weight in layers.get("quantised", [])]
    if quantised:
        tables.append(Table(f"Quantised weights of {engine['file']}", ["module", "layer", "type"], quantised))
    return tables
