"""The target `genai`: an ONNX artifact that onnxruntime-genai loads too, from C++, C#, Java, Python and on phones.

Beside the artifact's graphs lies one more over the same weights, with the inputs and outputs that genai binds (see
`export.rewrites.genai_layout`), and genai_config.json, which describes it.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from export.clients.genai import CLIENT, CONFIG, GenaiSession
from export.clients.masked import MaskedSession, OrtRunner
from export.errors import ExportError, VerificationError
from export.package.directory import write_json
from export.package.graph_files import WEIGHTS
from export.package.manifest import write_manifest
from export.rewrites.genai_layout import HALVES, PAST, PRESENT, genai_layout, to_genai
from export.targets.base import Draft, Target, check_float_caches
from export.targets.onnx_artifact import ONNX, OnnxOptions
from export.targets.tensorrt import copy_artifact
from export.verification.comparison import worst
from export.verification.judging import Expected, check_artifact
from export.verification.record import read_origin
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, Artifact, Graph, Manifest
from runtime.backends.base import Session

GRAPH = "model.genai.onnx"
SECTION = "genai"  # of the manifest
FLOAT_CACHES = "onnxruntime-genai has one dtype for all caches, and the biases are floats"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")  # of generation_config.json


@dataclass(frozen=True)
class GenaiOptions(OnnxOptions):
    """What the ONNX artifact is to be; of a source that is one, nothing."""


class GenaiTarget(Target[GenaiOptions]):
    name = "genai"
    help = "Write an artifact that onnxruntime-genai loads too, and compare what genai says with the eager model."
    options = GenaiOptions
    source_help = f"{Target.source_help[:-1]}; or an artifact, which is copied."

    def write(self, draft: Draft, options: GenaiOptions) -> Expected:
        """Copy the source where it is an artifact, else export and compare it; then add genai's graph and config.

        Raises `VerificationError` where the ONNX graph is not the eager model's.
        """
        expected = Expected(draft.load_model)
        if options.kv_cache_dtype is not None:
            raise ExportError(f"--kv-cache-dtype is {options.kv_cache_dtype}: {FLOAT_CACHES}; leave it out")
        if (Path(draft.source) / MANIFEST).is_file():
            if options != GenaiOptions():
                raise ExportError(f"{draft.source}: is an artifact, which stays as it is; export its checkpoint anew")
            artifact = copy_artifact(draft, None)
            _check_no_classifier(draft.source, artifact.graph.labels is not None)
            check_float_caches(artifact.graph, draft.source, FLOAT_CACHES)
            origin = read_origin(artifact, None)
            draft.source, draft.seed = origin.source, origin.seed
        else:
            _check_no_classifier(draft.source, draft.open_source().is_classifier())
            expected = ONNX.write(draft, OnnxOptions(**vars(options)))
            write_manifest(draft.directory, draft.manifest, verified=False)
            comparisons = check_artifact(draft.directory, expected, ONNX.open, draft.progress)
            if not all(comparison.passed for comparison in comparisons):
                raise VerificationError(f"{draft.source}: {worst(comparisons)}; genai gets no graph that is like it")
            artifact = read_artifact(draft.directory, allow_unverified=True)
        draft.progress.stage("writing genai's graph")
        write_genai(artifact, draft.directory)
        draft.add_section(SECTION, {"file": GRAPH, "config": CONFIG})
        return expected

    def open(self, artifact: Artifact) -> Session:
        """The artifact in genai where that is installed, else its graph for genai in ONNX Runtime.

        While A is another than the model's, the graph is made of the artifact's anew, in a directory of its own.
        """
        directory, scratch = artifact.path, None
        if artifact.graph.cpu_file not in artifact.files:
            scratch = TemporaryDirectory(prefix=".genai.", dir=directory)
            directory = Path(scratch.name)
            (directory / WEIGHTS).hardlink_to(artifact.path / WEIGHTS)
            write_genai(artifact, directory)
        if find_spec(CLIENT) is None:
            return MaskedSession(artifact.graph, OrtRunner(directory / GRAPH), artifact.graph.max_length, keeps=scratch)
        return GenaiSession(artifact.graph, directory, keeps=scratch)

    def summary(self, directory: Path, manifest: Manifest) -> list[str]:
        """What was compared with the eager model."""
        client = "onnxruntime-genai" if find_spec(CLIENT) else "ONNX Runtime; the extra genai runs genai"
        return [f"compared with the eager model by way of {client}"]


GENAI = GenaiTarget()


def _check_no_classifier(source: str, is_classifier: bool) -> None:
    if is_classifier:
        raise ExportError(f"{source}: is a classifier, and onnxruntime-genai only writes text; use wm-export onnx")


def write_genai(artifact: Artifact, directory: Path) -> None:
    """Write genai's form of the artifact's graph, and genai_config.json, into `directory`, beside the weights."""
    graph, config = artifact.graph, artifact.read_json("config.json")
    layout = genai_layout(graph.states, config["num_hidden_layers"])
    model = ir.load(artifact.path / graph.cpu_file)
    to_genai(model, layout)
    ir.save(model, directory / GRAPH)
    generation = artifact.read_json("generation_config.json")
    write_json(directory / CONFIG, genai_config(graph, config, generation, layout.layers))


def genai_config(graph: Graph, config: dict[str, Any], generation: dict[str, Any], layers: int) -> dict[str, Any]:
    """What genai_config.json says of a model whose config.json and generation_config.json are these.

    `layers`: how many genai counts. A token that the model lacks is left out, or is that of the end.
    """
    special = {name: generation.get(name, config.get(name)) for name in SPECIAL}
    if special["pad_token_id"] is None:
        ends = special["eos_token_id"]
        special["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    heads = config["num_attention_heads"]
    names = {
        f"{end}_{half}_names": f"{prefix}.%d.{half}"
        for end, prefix in (("past", PAST), ("present", PRESENT))
        for half in HALVES
    }
    decoder = {
        "filename": GRAPH,
        "session_options": {"log_id": "genai", "session.set_denormal_as_zero": "1", "provider_options": []},
        "hidden_size": config["hidden_size"],
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "num_hidden_layers": layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{name: value for name, value in names.items() if name.startswith("past")},
        },
        "outputs": {"logits": "logits", **{name: value for name, value in names.items() if name.startswith("present")}},
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": graph.vocabulary,
            "context_length": graph.max_length,
            **{name: value for name, value in special.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            **{name: generation[name] for name in SAMPLING if generation.get(name) is not None},
            "max_length": graph.max_length,
            "past_present_share_buffer": True,
        },
    }
