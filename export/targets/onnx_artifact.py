"""The target `onnx`: checkpoint → model → graph → artifact, which every other target starts from.

B batch (slots), C cache capacity.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch

from export.errors import ExportError
from export.lower import cache_window, lower
from export.package.graph_files import CPU_GRAPH, GRAPH, save_graph
from export.package.manifest import capacities, describe, label_count, parameter_count, write_manifest
from export.quantization.caches import cache_scales, quantize_caches
from export.quantization.calibration import ROWS, written_moments
from export.quantization.schemes import BLOCKS, SCHEMES
from export.quantization.weights import activations, quantize_graph
from export.rewrites.fixed_capacity import fix_capacity
from export.rewrites.last_row import take_last_row
from export.targets.base import Draft, Target
from export.verification.judging import Expected
from export.verification.ranges import check_biases, check_weights
from export.verification.reference import references
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import LOGITS, Graph, Manifest
from runtime.console import option
from runtime.host.memory import return_freed
from wm_models.decoder import DecoderWithHead

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KV_CACHE_DTYPES = ("int8",)  # besides the graph's own
FIXED = "model.fixed.onnx"  # the portable graph with caches of one size
SPARE = 128  # rows of a cache beyond the keep window: the most tokens of a prefill's step, and the steps between moves
DEFAULT_BLOCKS = ", ".join(f"{scheme.block} with {name}" for name, scheme in SCHEMES.items())


@dataclass(frozen=True)
class OnnxOptions:
    """What an ONNX artifact is to be. Raises `ExportError` for a value that none can have.

    `spare`: where the model keeps a window of w keys, a cache has at most w + `spare` rows.
    """

    dtype: str = option("fp32", f"Of weights, caches and arithmetic: {', '.join(DTYPES)}.")
    quantize: str | None = option(
        None, f"Store the weights as {' or '.join(SCHEMES)}, in blocks; caches and arithmetic stay fp32."
    )
    block_size: int | None = option(
        None,
        f"Weights to a scale at most: {', '.join(map(str, BLOCKS))}. More are faster and less exact. "
        f"Default: {DEFAULT_BLOCKS}.",
    )
    kv_cache_dtype: str | None = option(
        None, f"Store the caches of keys and values as {' or '.join(KV_CACHE_DTYPES)}. Default: as --dtype."
    )
    max_length: int | None = option(None, "Most tokens a slot holds. Default: all that RoPE allows.")
    max_batch: int = option(8, "Most slots a step serves.")
    logits: str = option("last", "Logits of the last tokens of each slot, as many as a step asks for, or of all.")
    capacity: int | None = option(
        None, f"Also write {FIXED}, whose caches have room for exactly so many tokens, as TensorRT wants them."
    )
    report: bool = option(
        False, "Write report.html into the artifact: verification, quality and sizes on one page.", flag="--report"
    )
    spare: int = SPARE

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ExportError(f"--dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.quantize is not None and (self.quantize not in SCHEMES or self.dtype != "fp32"):
            raise ExportError(
                f"--quantize is {self.quantize!r} with --dtype {self.dtype}; expected one of {', '.join(SCHEMES)}, "
                "with --dtype fp32"
            )
        if self.block_size is not None and (self.quantize is None or self.block_size not in BLOCKS):
            raise ExportError(
                f"--block-size is {self.block_size} with --quantize {self.quantize or 'unset'}; expected one of "
                f"{', '.join(map(str, BLOCKS))}, with --quantize"
            )
        wanted = self.kv_cache_dtype
        if wanted is not None and (wanted not in KV_CACHE_DTYPES or self.dtype == "bf16"):
            raise ExportError(
                f"--kv-cache-dtype is {wanted!r} with --dtype {self.dtype}; expected {' or '.join(KV_CACHE_DTYPES)}, "
                "with --dtype fp32 or fp16"
            )
        if self.logits not in LOGITS:
            raise ExportError(f"--logits is {self.logits!r}; expected one of {', '.join(LOGITS)}")
        if self.max_batch < 1:
            raise ExportError(f"--max-batch is {self.max_batch}; expected at least 1")


class OnnxTarget(Target[OnnxOptions]):
    name = "onnx"
    help = "Write an ONNX artifact and compare it with the eager model."
    options = OnnxOptions

    def write(self, draft: Draft, options: OnnxOptions) -> Expected:
        """Write the graphs, their weights and the texts, and fill the manifest."""
        draft.progress.stage("loading the model")
        model, dtype = draft.load_model(), DTYPES[options.dtype]
        check_model(model, draft.source, dtype)
        contract = _contract(model, options)
        draft.copy_texts(model)
        expected = Expected(draft.load_model)
        if options.quantize is None:
            expected.answers, biases = references(model, contract, progress=draft.progress)
            check_biases(biases, dtype)
        config, parameters = model.config.to_dict(), parameter_count(model)
        draft.progress.stage("lowering to ONNX")
        model.to(dtype=dtype)  # type: ignore[call-arg]
        bounds = {"max_batch": max(contract.max_batch, ROWS), "max_length": contract.max_length}
        graph = lower(model, all_logits=options.logits == "all", window=contract.window, **bounds)
        with TemporaryDirectory(dir=draft.directory) as exact:
            if options.quantize is not None or options.kv_cache_dtype is not None:
                description = describe(graph, config, 0, _exact(contract))
                save_graph(graph, Path(exact), contract.dtype)
                release_weights(model, graph)
                graph = _quantized(Path(exact), description, options, draft)
            draft.progress.stage("writing")
            save_graph(graph, draft.directory, contract.dtype, contract.quantization)
            release_weights(model, graph)
            if options.capacity is not None:
                write_fixed(draft.directory, contract, options.capacity)
        draft.manifest, draft.report = describe(graph, config, parameters, contract), options.report
        return expected


ONNX = OnnxTarget()


def write_fixed(directory: Path, contract: Graph, capacity: int) -> None:
    """Write the portable graph once more, over the same weights, with caches of one size and one row of logits."""
    model = ir.load(directory / GRAPH)
    rows = min(capacity, contract.window.rows) if contract.window else capacity
    caches = [value for value in model.graph.inputs if value.shape is not None and "capacity" in map(str, value.shape)]
    take_last_row(model.graph)
    fix_capacity(model.graph, rows, [value.name or "" for value in caches])
    ir.save(model, directory / FIXED)


def release_weights(model: DecoderWithHead, graph: ir.Model) -> None:
    """Free the weights of a model and of its graph, which is written.

    A graph's matrices are transposed copies of the model's. The exporter's optimizer keeps hold of the latest graph.
    """
    for value in graph.graph.initializers.values():
        value.const_value = None
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    return_freed()


def check_model(model: DecoderWithHead, source: str, dtype: torch.dtype) -> None:
    """Raise `ExportError` for weights that are not finite in `dtype`, and for experts that have no step graph."""
    check_weights(model, dtype)
    if model.config.is_moe and model.config.expert_routing == "batch":
        raise ExportError(
            f"{source}: its experts are routed by expert_routing='batch', which mixes the tokens of a batch and so has "
            'no step graph; set "expert_routing": "token" in config.json if the weights were trained for it'
        )


def _contract(model: DecoderWithHead, options: OnnxOptions) -> Graph:
    """What the graph will promise; its states and its opset are known once it is lowered."""
    max_length = checked_length(model, options.max_length)
    if options.capacity is not None and not 2 <= options.capacity <= max_length:
        raise ExportError(f"--capacity is {options.capacity}; expected 2 to {max_length}, the longest sequence")
    portable = options.dtype != "bf16" and options.quantize is None
    return Graph(
        file=GRAPH,
        cpu_file=GRAPH if portable else CPU_GRAPH,
        vocabulary=model.config.vocab_size,
        capacities=tuple(capacities(max_length)),
        states=(),
        dtype=str(DTYPES[options.dtype]).removeprefix("torch."),
        logits=options.logits,
        indexed=options.logits == "last",
        max_batch=options.max_batch,
        max_length=max_length,
        window=cache_window(model.config, max_length, options.spare),
        labels=label_count(model),
        quantization=options.quantize or "none",
    )


def _exact(contract: Graph) -> Graph:
    """The contract of the float graph that a quantised one is made of; it writes `ROWS` rows of text at a time."""
    return replace(contract, max_batch=ROWS, quantization="none", cpu_file=GRAPH)


def checked_length(model: DecoderWithHead, max_length: int | None) -> int:
    """`max_length`, by default all that RoPE allows. Raises `ExportError` beyond that."""
    rope, limit = model.config.rope, model.config.longest_sequence
    length = limit if max_length is None else max_length
    if not 2 <= length <= limit:
        raise ExportError(f"--max-length is {length}; this model's RoPE ({rope['rope_type']}) allows 2 to {limit}")
    return length


def _quantized(exact: Path, manifest: Manifest, options: OnnxOptions, draft: Draft) -> ir.Model:
    """The float graph in the directory `exact` with the weights and caches quantised that `options` name.

    The directory becomes an artifact, which writes the calibration text, and is observed as it does so.
    """
    path, scheme = exact / manifest.graph.file, SCHEMES.get(options.quantize or "")
    names = activations(ir.load(path)) if scheme is not None and scheme.calibrates else []
    text, moments = np.zeros((0, 0), np.int64), {}
    if names or options.kv_cache_dtype is not None:
        write_manifest(exact, manifest, verified=False)
        artifact = read_artifact(exact, allow_unverified=True)
        text, moments = written_moments(artifact, names, draft.progress)
        return_freed()
    scales = {} if options.kv_cache_dtype is None else cache_scales(path, text, draft.progress)
    if scheme is None:
        graph = ir.load(path)
    else:
        graph = quantize_graph(path, scheme, options.block_size or scheme.block, moments, draft.progress)
    quantize_caches(graph, scales)
    return graph
