"""The target `hf-onnx`: Hugging Face's layout, for transformers.js, optimum, OpenVINO and onnxruntime-web.

    config.json, tokenizer files       as the clients read them: the model calls itself a Llama, whose cache they know
    onnx/model.onnx                    the graph of `export.lower_growing`; quantised, with ONNX Runtime's own operators
    onnx/model_portable.onnx           quantised only: the same with ONNX's operators alone, which OpenVINO takes
    onnx/model.onnx_data               the weights, once

B batch, S tokens of a row of text.
"""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from export.clients.masked import POSITIONS, MaskedSession, OpenVinoRunner, OrtRunner
from export.errors import ExportError
from export.lower_growing import lower_growing
from export.package.directory import write_json
from export.package.manifest import parameter_count
from export.quantization.calibration import LENGTH, ROWS, Feed, second_moments, written_text
from export.quantization.schemes import SCHEMES
from export.quantization.weights import activations, quantize_graph
from export.rewrites.cpu_quantized import use_cpu_quantized_operators
from export.targets.base import Draft, Target
from export.targets.onnx_artifact import DEFAULT_BLOCKS, DTYPES, OnnxOptions, check_model, checked_length
from export.verification.comparison import Comparison
from export.verification.judging import Expected, check, compare_artifact
from export.verification.ranges import check_biases
from export.verification.record import write_record
from export.verification.reference import references
from runtime import Engine
from runtime.artifact.folder import Folder
from runtime.artifact.manifest import Artifact, Graph, Manifest, Model
from runtime.backends.base import Session
from runtime.console import option
from wm_models import DogeConfig
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead
from wm_models.layers.attention import DMAttention

FOLDER, GRAPH, PORTABLE, WEIGHTS = "onnx", "model.onnx", "model_portable.onnx", "model.onnx_data"
KNOWN_AS = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
KEPT = (  # of config.json: what a client reads of a Llama
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
MOST_SLOTS = 8  # of a batch that is compared
NARROW = ("fp32", "fp16")


@dataclass(frozen=True)
class HfOnnxOptions:
    """What the graph is to be. Raises `ExportError` for a value that the clients do not take."""

    dtype: str = option("fp32", f"Of weights, caches and arithmetic: {' or '.join(NARROW)}.")
    quantize: str | None = option(None, f"Store the weights as {' or '.join(SCHEMES)}, in blocks.")
    block_size: int | None = option(None, f"Weights to a scale at most. Default: {DEFAULT_BLOCKS}.")
    max_length: int | None = option(None, "Most tokens of a sequence. Default: all that RoPE allows.")

    def __post_init__(self) -> None:
        if self.dtype in DTYPES and self.dtype not in NARROW:
            raise ExportError(f"--dtype is {self.dtype}; these clients compute with {' or '.join(NARROW)}")
        OnnxOptions(self.dtype, self.quantize, self.block_size)  # refuses what no graph can be


class HfOnnxTarget(Target[HfOnnxOptions]):
    """The graph is compared in ONNX Runtime and, where it is installed, in OpenVINO; slots are padded on both sides."""

    name = "hf-onnx"
    help = "Write a directory for transformers.js, optimum, OpenVINO and onnxruntime-web, and compare it."
    options = HfOnnxOptions

    def write(self, draft: Draft, options: HfOnnxOptions) -> Expected:
        """Write the graph, its weights and the texts."""
        draft.progress.stage("loading the model")
        model, dtype = draft.load_model(), DTYPES[options.dtype]
        check_model(model, draft.source, dtype)
        check_layout(model, draft.source)
        graph = _described(model, options)
        config = model.config.to_dict()
        description = Model(config["model_type"], parameter_count(model), config)
        draft.manifest = Manifest(description, graph, files={}, verified=False)  # for whoever asks; no file says it
        draft.copy_texts(model)
        _adapt_texts(model.config, Path(draft.source).name, graph, draft.directory)
        expected = Expected(draft.load_model)
        if options.quantize is None:
            expected.answers, biases = references(model, graph, progress=draft.progress)
            check_biases(biases, dtype)
        draft.progress.stage("lowering to ONNX")
        model.to(dtype=dtype)  # type: ignore[call-arg]
        feed = _feed(model.config)
        lowered = lower_growing(model, graph.max_length)
        del model  # one copy of the weights at a time
        folder = draft.directory / FOLDER
        folder.mkdir()
        with TemporaryDirectory(dir=folder) as exact:
            if options.quantize is not None:
                lowered = _quantized(lowered, Path(exact), graph, options, feed, draft)
            draft.progress.stage("writing")
            ir.save(lowered, folder / graph.file, external_data=WEIGHTS, size_threshold_bytes=1024)
        if options.quantize is not None:
            ir.save(use_cpu_quantized_operators(ir.load(folder / PORTABLE)), folder / GRAPH)
        return expected

    def finish(self, draft: Draft, expected: Expected | None) -> list[Comparison]:
        """Compare the graph in each client that is installed, and write verification.json."""
        assert expected is not None
        artifact = _artifact(draft.directory / FOLDER, draft.manifest.graph)
        comparisons = compare_artifact(artifact, expected, self.open, draft.progress)
        if find_spec("openvino") and expected.answers is not None:
            for reference in expected.answers:
                reference.cases = [replace(case, name=f"OpenVINO: {case.name}") for case in reference.cases]
            comparisons += check(artifact, expected.answers, _open_in_openvino, draft.progress)
        write_record(draft.directory, draft.origin(self.name), comparisons)
        return comparisons

    def open(self, artifact: Artifact) -> Session:
        """The graph in ONNX Runtime; the portable form of a quantised one in OpenVINO where that is installed."""
        if artifact.graph.cpu_file == PORTABLE and find_spec("openvino"):
            return _open_in_openvino(artifact)
        return MaskedSession(artifact.graph, OrtRunner(artifact.path / artifact.graph.cpu_file), mixed=True)

    def summary(self, directory: Path, manifest: Manifest) -> list[str]:
        """Which clients were run."""
        clients = "ONNX Runtime and OpenVINO" if find_spec("openvino") else "ONNX Runtime; the extra openvino runs that"
        return [f"compared with the eager model by way of {clients}"]


HF_ONNX = HfOnnxTarget()


def _open_in_openvino(artifact: Artifact) -> Session:
    return MaskedSession(artifact.graph, OpenVinoRunner(artifact.path / artifact.graph.cpu_file), mixed=True)


def check_layout(model: DecoderWithHead, source: str) -> None:
    """Raise `ExportError` for a model that has no place in this layout, and say what takes it."""
    config = model.config
    if not isinstance(model, DecoderForCausalLM):
        raise ExportError(f"{source}: is a classifier; these clients' layout of caches is a language model's")
    layers: Any = model.model.layers
    for index, layer in enumerate(layers):
        if type(layer.mixer) is not DMAttention:
            kind = type(layer.mixer).__name__
            raise ExportError(f"{source}: layer {index} is {kind}, whose state these clients lack; use wm-export genai")
    if config.dynamic_mask_ratio:
        raise ExportError(
            f"{source}: drops a share of each sequence's keys (dynamic_mask_ratio={config.dynamic_mask_ratio}), which "
            "cannot be counted in a padded batch of this layout; use wm-export genai"
        )


def _described(model: DecoderWithHead, options: HfOnnxOptions) -> Graph:
    max_length = checked_length(model, options.max_length)
    quantized = options.quantize is not None
    return Graph(
        file=PORTABLE if quantized else GRAPH,
        cpu_file=GRAPH,
        dtype=str(DTYPES[options.dtype]).removeprefix("torch."),
        quantization=options.quantize or "none",
        logits="all",
        vocabulary=model.config.vocab_size,
        max_batch=MOST_SLOTS,
        max_length=max_length,
        capacities=(max_length,),
        states=(),
    )


def _artifact(directory: Path, graph: Graph) -> Artifact:
    """The graph in `directory` as the comparison wants it described."""
    return Artifact(
        path=directory,
        manifest=b"",
        model_type=str(KNOWN_AS["model_type"]),
        parameters=0,
        graph=graph,
        sections={},
        files={},
        texts={},
        verified=False,
        folder=Folder(directory),
        graphs={},
    )


def _adapt_texts(config: DogeConfig, name: str, graph: Graph, directory: Path) -> None:
    """Write config.json anew as the clients read it, and a tokenizer's class by the name that they all know."""
    values = config.to_dict()
    described = {
        **KNOWN_AS,
        **{key: values[key] for key in KEPT},
        "name": name,
        "head_dim": config.head_size,
        "num_key_value_heads": config.key_value_heads,
        "torch_dtype": graph.dtype,
        "transformers.js_config": {
            "dtype": "fp32",  # which names the file model.onnx, whatever is in it
            "use_external_data_format": True,
            "kv_cache_dtype": graph.dtype,
        },
    }
    write_json(directory / "config.json", described)
    path = directory / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 alone calls it so
            write_json(path, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})


def _quantized(
    lowered: ir.Model, exact: Path, graph: Graph, options: HfOnnxOptions, feed: Feed, draft: Draft
) -> ir.Model:
    """The graph with quantised weights. The float32 one, saved in the directory `exact`, writes the text."""
    scheme, moments = SCHEMES[options.quantize or ""], {}
    ir.save(lowered, exact / GRAPH, external_data=WEIGHTS, size_threshold_bytes=1024)
    if scheme.calibrates:
        artifact = _artifact(exact, replace(graph, max_batch=ROWS))
        engine = Engine(artifact, MaskedSession(artifact.graph, OrtRunner(exact / GRAPH)))
        text = written_text(engine, LENGTH, progress=draft.progress)
        saved = ir.load(exact / GRAPH)
        names = activations(saved)
        moments = second_moments(saved, exact / "moments.onnx", text, names, feed, draft.progress)
    return quantize_graph(exact / GRAPH, scheme, options.block_size or scheme.block, moments, draft.progress)


def _feed(config: DogeConfig) -> Feed:
    """The inputs for rows of text, float32, with empty caches."""
    layers = range(config.num_hidden_layers)

    def feed(rows: np.ndarray) -> dict[str, np.ndarray]:
        empty = np.zeros((len(rows), config.key_value_heads, 0, config.head_size), np.float32)
        caches = {f"past_key_values.{layer}.{half}": empty for layer in layers for half in ("key", "value")}
        positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        return {"input_ids": rows, "attention_mask": np.ones_like(rows), POSITIONS: positions, **caches}

    return feed
