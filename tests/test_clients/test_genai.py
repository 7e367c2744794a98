"""onnxruntime-genai runs what `wm-export genai` writes, and says what the engine says."""

import json
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from conftest import baseline, ours
from test_export.conftest import VARIANTS, lowered, save_checkpoint

from export.clients.genai import CLIENT
from export.clients.masked import MaskedSession, OrtRunner
from export.errors import ExportError
from export.targets.base import write_artifact
from export.targets.genai import CONFIG, GENAI, GRAPH, GenaiOptions
from export.targets.onnx_artifact import ONNX
from runtime import Engine, load
from runtime.text.tokenizer import encode
from test_clients.conftest import PROMPTS, TOKENS, needs_genai

pytestmark = needs_genai
client: Any = import_module(CLIENT) if find_spec(CLIENT) else None


@pytest.fixture(scope="module")
def model(for_genai):
    return client.Model(str(for_genai))


def generator(model, **options):
    parameters = client.GeneratorParams(model)
    parameters.set_search_options(**options)
    return client.Generator(model, parameters)


def write(running, count: int) -> None:
    for _ in range(count):
        running.generate_next_token()


def test_greedy_ids_of_one_prompt_and_of_a_ragged_batch(model, for_genai, expected):
    tokenizer = client.Tokenizer(model)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        running = generator(model, max_length=96, do_sample=False)
        running.append_tokens(tokenizer.encode(prompt))
        write(running, TOKENS)
        assert running.get_sequence(0)[-TOKENS:].tolist() == ids
    running = generator(model, max_length=96, batch_size=len(PROMPTS), do_sample=False)
    running.append_tokens(tokenizer.encode_batch(list(PROMPTS)))
    write(running, TOKENS)
    assert [running.get_sequence(row)[-TOKENS:].tolist() for row in range(len(PROMPTS))] == expected


def test_a_rewound_sequence_goes_on_as_it_did(model, expected):
    ids = client.Tokenizer(model).encode(PROMPTS[0])
    running = generator(model, max_length=96, do_sample=False)
    running.append_tokens(ids)
    write(running, TOKENS)
    running.rewind_to(len(ids))
    running.append_tokens(np.array(expected[0][:4], np.int32))
    write(running, TOKENS - 4)
    assert running.get_sequence(0)[len(ids) :].tolist() == expected[0]


def test_its_tokenizer_is_the_engines(model, for_genai):
    tokenizer, engine = client.Tokenizer(model), load(for_genai)
    for text in (*PROMPTS, "ä €\n\tx == 1"):
        assert tokenizer.encode(text).tolist() == encode(engine.tokenizer, text, engine.artifact)


def test_the_directory_is_still_an_artifact_and_its_weights_are_there_once(for_genai, expected, shipped):
    engine = load(for_genai)
    assert engine.graph == load(shipped).graph
    weights = [path for path in for_genai.iterdir() if path.stat().st_size > 1e6]
    assert [path.name for path in weights] == ["model.onnx.data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["window", "experts", "sliding window", "dynamic rope", "fp16", "bf16", "int8", "int4", "hybrid experts"]
)
def test_genai_agrees_with_the_eager_model(name, tmp_path):
    changes, options = VARIANTS[name]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **changes)
    options = {**options, "max_length": 80, "max_batch": 4}
    written = write_artifact(GENAI, checkpoint, tmp_path / "artifact", GenaiOptions(**options))
    assert written.comparisons
    assert all(found.passed for found in written.comparisons)


def test_without_genai_its_graph_runs_in_onnx_runtime(for_genai, shipped):
    """The graph reads a mask; a slot that sits a step out keeps its content."""
    engine, artifact = load(shipped), load(for_genai).artifact
    other = Engine(artifact, MaskedSession(artifact.graph, OrtRunner(for_genai / GRAPH), artifact.graph.max_length))
    ids, lengths = np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2])
    np.testing.assert_array_equal(other.prefill(ids, lengths), engine.prefill(ids, lengths))
    new, active = np.array([[11], [12]]), np.array([1, 0])
    np.testing.assert_array_equal(other.prefill(new, active)[0], engine.prefill(new, active)[0])
    np.testing.assert_array_equal(other.decode([3, 4]), engine.decode([3, 4]))


def test_the_config_names_what_the_graph_has(for_genai):
    config = json.loads((for_genai / CONFIG).read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 4 + 2  # four layers, and two pairs of biases
    assert config["search"]["past_present_share_buffer"]


def test_refusals_name_what_genai_cannot_take(shipped, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="is an artifact, which stays as it is"):
        write_artifact(GENAI, shipped, tmp_path / "a", GenaiOptions(dtype="fp16"))
    classifier = save_checkpoint(tmp_path / "classifier", num_labels=3)
    artifact = lowered(tmp_path / "artifact", ours(baseline(num_labels=3), expert_routing="token")).path
    monkeypatch.setattr(ONNX, "write", None)  # the refusal comes before the export
    for source in classifier, artifact:
        with pytest.raises(ExportError, match=f"{source}: is a classifier"):
            write_artifact(GENAI, source, tmp_path / "b", GenaiOptions())
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
