"""checkpoint → model → graph → artifact: one call, and nothing half-written."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch

from export.errors import ExportError
from export.lower import cache_window, lower
from export.package.directory import (
    check_free,
    describe,
    label_count,
    parameter_count,
    replacing,
    save_graph,
    write_manifest,
)
from export.quantization.graph import BITS, BLOCKS, LARGEST, LENGTH, ROWS, quantize_graph, written_text
from export.source import copy_texts, load_model
from export.verification.compare import Comparison, check_exact, check_quantized, record_verdicts, references
from export.verification.ranges import check_biases, check_weights
from runtime import load
from wm_models.decoder import DecoderWithHead

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOGITS = ("last", "all")
SPARE = 128  # rows of a cache beyond the keep window: the most tokens of a prefill's step, and the steps between moves


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    max_length: int | None = None,
    max_batch: int = 8,
    logits: str = "last",
    quantize: str | None = None,
    block_size: int | None = None,
    seed: int = 0,
    force: bool = False,
    spare: int = SPARE,
    stage: Callable[[str], None] = lambda name: None,
    report: Callable[[Comparison], None] = lambda verdict: None,
) -> list[Comparison]:
    """Export `source`, a checkpoint directory or a preset's name, into the artifact directory `out`, and verify it.

    `dtype` of weights, caches and arithmetic: fp32, fp16 or bf16. `max_length` in tokens (default: what RoPE allows);
    `max_batch` slots; `logits` of the last real token or of all; `quantize` the weights to int8 or int4, caches and
    arithmetic staying fp32; `block_size` weights to a scale at most (default: 128 with int8, 32 with int4, whose tables
    never have more): larger blocks are faster and less exact; `seed` for a preset's random weights; `force` replaces
    what `out` holds once the new artifact is whole. Where the model keeps a window of w keys, a cache has at most w +
    `spare` rows. `stage` and `report` are told of progress.

    Returns the comparisons with the eager model. An artifact that fails one is kept for inspection, but marked: it
    loads only with `allow_unverified=True`. Raises `ExportError`, `wm_models.CheckpointError`, OSError.
    """
    source, out = os.fspath(source), Path(out)
    if dtype not in DTYPES:
        raise ExportError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if quantize is not None and (quantize not in BITS or dtype != "fp32"):
        raise ExportError(
            f"--quantize is {quantize!r} with --dtype {dtype}; expected one of {', '.join(BITS)}, with --dtype fp32"
        )
    if block_size is not None and (quantize is None or block_size not in BLOCKS):
        raise ExportError(
            f"--block-size is {block_size} with --quantize {quantize or 'unset'}; expected one of "
            f"{', '.join(map(str, BLOCKS))}, with --quantize"
        )
    if logits not in LOGITS:
        raise ExportError(f"--logits is {logits!r}; expected one of {', '.join(LOGITS)}")
    if max_batch < 1:
        raise ExportError(f"--max-batch is {max_batch}; expected at least 1")
    check_free(out, force)
    stage("loading")
    model = load_model(source, seed)
    max_length = checked_length(model, max_length)
    check_weights(model, DTYPES[dtype])
    if model.config.is_moe and model.config.expert_routing == "batch":
        raise ExportError(
            f"{source}: its experts are routed by expert_routing='batch', which mixes the tokens of a batch and so has "
            'no step graph; set "expert_routing": "token" in config.json if the weights were trained for it'
        )
    window = cache_window(model.config, max_length, spare)
    labels = label_count(model)
    sizes = {"logits": logits, "max_batch": max_batch, "max_length": max_length, "window": window, "labels": labels}
    config, parameters = model.config.to_dict(), parameter_count(model)
    origin = {"source": os.path.abspath(source) if os.path.isdir(source) else source, "seed": seed}
    with replacing(out, force) as directory:
        copy_texts(model, source, directory)
        answers = None
        if quantize is None:
            stage("computing the eager model's answers")
            answers, biases = references(model, max_length, max_batch, window)
            check_biases(biases, DTYPES[dtype])
        stage("lowering to ONNX")
        torch_dtype = DTYPES[dtype]
        options = {**sizes, "dtype": str(torch_dtype).removeprefix("torch."), "quantization": quantize or "none"}
        model.to(dtype=torch_dtype)  # type: ignore[call-arg]
        bounds = {"max_batch": max(max_batch, ROWS), "max_length": max_length, "window": window}
        graph = lower(model, all_logits=logits == "all", **bounds)
        del model  # one copy of the weights at a time
        with TemporaryDirectory(dir=directory) as exact:
            if quantize is not None:
                graph = _quantized(graph, Path(exact), config, BITS[quantize], block_size, sizes, stage)
            stage("writing")
            save_graph(graph, directory, options["dtype"], options["quantization"])
        manifest = describe(graph, config, parameters, **options)
        del graph
        write_manifest(directory, manifest, verified=False)
        stage("verifying")
        if answers is None:
            verdicts = check_quantized(directory, load_model(source, seed), report)
        else:
            verdicts = check_exact(directory, answers, lambda: load_model(source, seed), report)
        record_verdicts(directory, manifest, origin, verdicts)
        return verdicts


def _quantized(
    graph: ir.Model, exact: Path, config: dict[str, Any], bits: int, block_size: int | None, sizes: dict[str, Any],
    stage: Callable[[str], None],
) -> ir.Model:  # fmt: skip
    """The graph with quantised weights. An artifact of the float32 one, in the directory `exact`, writes the text."""
    save_graph(graph, exact, "float32")
    manifest = describe(graph, config, 0, dtype="float32", **{**sizes, "max_batch": ROWS})
    write_manifest(exact, manifest, verified=False)
    stage("writing text with the float32 model")
    text = written_text(load(exact, "cpu", allow_unverified=True), LENGTH) if bits < 8 else None
    stage("quantising")
    return quantize_graph(exact, manifest["graph"]["file"], bits, block_size or LARGEST[bits], text)


def checked_length(model: DecoderWithHead, max_length: int | None) -> int:
    """`max_length`, by default all that RoPE allows. Raises `ExportError` beyond that."""
    rope = model.config.rope
    limit = model.config.max_position_embeddings
    if rope["rope_type"] == "dynamic":
        limit = int(limit * rope["factor"])
    length = limit if max_length is None else max_length
    if not 2 <= length <= limit:
        raise ExportError(f"--max-length is {length}; this model's RoPE ({rope['rope_type']}) allows 2 to {limit}")
    return length
