"""A classifier at run time: against transformers' pipeline, files in and out, and what is asked of the wrong kind."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import transformers
from conftest import baseline, ours

from export import OnnxOptions, export_onnx
from runtime import ArtifactError, RequestError, load
from runtime.batch import classify_file, generate_file, generate_many
from runtime.bench import BenchOptions, measure
from runtime.prompts import read_prompts
from runtime.text.labels import label_names, label_scores
from wm_models import shipped_tokenizer

NAMES = ("code", "prose", "neither", "é")
TEXTS = ["def main(", "import os, sys\nfor name in sorted(os.listdir()):\n    print(name)", "x", "The end.", "a b c"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("classify")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = baseline(vocab_size=32768, num_hidden_layers=1, pad_token_id=2, **labels)
    ours(model).save_pretrained(root / "checkpoint")
    shipped_tokenizer().save_pretrained(root / "checkpoint")
    assert all(
        v.passed for v in export_onnx(root / "checkpoint", root / "artifact", OnnxOptions(max_batch=3, max_length=100))
    )
    return root


@pytest.fixture
def engine(made):
    return load(made / "artifact")


@pytest.fixture
def pipeline(made):
    return transformers.pipeline("text-classification", str(made / "checkpoint"), device="cpu")


def test_it_is_the_pipeline(engine, pipeline):
    """From text to scores, for each way in which labels are read."""
    assert isinstance(pipeline.model, transformers.DogeForSequenceClassification)
    assert engine.labels == NAMES
    for problem in (None, "single_label_classification", "multi_label_classification", "regression"):
        pipeline.model.config.problem_type = problem
        config = json.dumps({"problem_type": problem}).encode()
        artifact = replace(engine.artifact, texts={"config.json": config})
        for text, logits in zip(TEXTS, engine.classify(TEXTS), strict=True):
            found = dict(zip(NAMES, label_scores(artifact, logits[None])[0], strict=True))
            expected = {entry["label"]: entry["score"] for entry in pipeline(text, top_k=None)}
            assert found == pytest.approx(expected, abs=1e-4)


def test_one_label_is_read_as_a_sigmoid(engine):
    assert label_scores(engine.artifact, np.float32([[0], [-200], [3]])).ravel() == pytest.approx([0.5, 0, 0.9525741])


def test_texts_ids_and_both_together(engine):
    """Whatever an input's company and form, its logits are the same; trailing padding is none of it."""
    alone = np.concatenate([engine.classify(text) for text in TEXTS])
    assert alone.shape == (5, 4)
    assert alone.dtype == np.float32
    ids = [engine.tokenizer.encode(text).ids for text in TEXTS]
    mixed = [TEXTS[0], ids[1], np.array(ids[2]), TEXTS[3], [*ids[4], 2, 2]]
    np.testing.assert_allclose(engine.classify(mixed), alone, atol=1e-4)
    np.testing.assert_allclose(engine.classify(np.array(ids[0])), alone[:1], atol=1e-4)
    np.testing.assert_array_equal(engine.classify([2, 2, 2]), engine.classify([2]))


def test_scores_of_the_most_likely_label_of_a_file(engine, tmp_path):
    """A label of the file's own stays; what was stopped goes on."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"text": text, "label": "prose"} for text in TEXTS] + [{"ids": [5, 6, 7]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(engine, source, key="text")
    assert sorted(classify_file(engine, prompts, out)) == list(range(6))
    whole = {answer["line"]: answer for answer in map(json.loads, out.read_text().splitlines())}
    logits = engine.classify([*TEXTS, [5, 6, 7]])
    for line, answer in whole.items():
        found, _ = answer.pop("prediction"), answer.pop("line_hash")
        assert answer == {**lines[line], "line": line}
        np.testing.assert_allclose(found["logits"], logits[line], atol=1e-4)
        assert found["label"] == NAMES[logits[line].argmax()]
        assert found["score"] == pytest.approx(np.exp(logits[line].max()) / np.exp(logits[line]).sum(), abs=1e-4)
    complete = sorted(out.read_bytes().splitlines())
    out.write_bytes(out.read_bytes()[:-9])
    assert len(list(classify_file(engine, prompts, out))) == 6
    assert [json.loads(line)["line"] for line in sorted(out.read_bytes().splitlines())] == [
        json.loads(line)["line"] for line in complete
    ]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "nothing to classify"),
        ("", "input 1: the prompt is empty"),
        (["x", []], "input 2: the prompt is empty"),
        ([[1], [1, 40000]], "input 2: token id 40000 at position 1"),
        ([[1], [0.5]], "input 2: ids are not all integers"),
        ([[[1]]], r"input 1: ids are int64 of shape \(1, 1\)"),
        ([1] * 101, "101 tokens; this artifact's capacity is 100"),
    ],
)
def test_request_errors(engine, inputs, words):
    with pytest.raises(RequestError, match=words):
        engine.classify(inputs)
    assert engine.lengths.size == 0


def test_it_writes_no_text(made, engine, tmp_path):
    prompts, out = read_prompts(engine, write(tmp_path / "in", {"ids": [1]})), tmp_path / "out"
    for ask in (
        lambda: engine.generate("x"),
        lambda: engine.stream("x"),
        lambda: engine.stream_ids([1]),
        lambda: engine.generate_ids([1]),
        lambda: list(generate_many(engine, prompts, 4, 1)),
        lambda: generate_file(engine, prompts, out, 4, 1),
    ):
        with pytest.raises(RequestError, match="is a classifier, which writes no text; use classify"):
            ask()
    assert not out.exists()
    with pytest.raises(RequestError, match=r"is a classifier, .* bench measures a language model"):
        measure(made / "artifact", BenchOptions(8, 8, rounds=1))


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "names", [[], {"0": "a"}, dict.fromkeys("01234", "a"), {**dict.fromkeys("012", "a"), "3": 4}, {0: [], "x": 1}, "a"]
)
def test_names_that_are_not_the_labels(engine, names):
    artifact = replace(engine.artifact, texts={"config.json": json.dumps({"id2label": names}).encode()})
    with pytest.raises(ArtifactError, match=r"config\.json: id2label does not name the graph's 4 labels"):
        label_names(artifact)


def test_labels_without_names(engine):
    assert label_names(replace(engine.artifact, texts={})) == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


def test_the_commands(made, engine, tmp_path):
    def command(*arguments, module="runtime"):
        code = f"from {module}.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-P", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    artifact, out = made / "artifact", tmp_path / "out.jsonl"
    done = command("classify", artifact, "--text", TEXTS[0])
    scores = label_scores(engine.artifact, engine.classify(TEXTS[0]))[0]
    expected = [f"{NAMES[index]}: {scores[index]:.4g}" for index in np.argsort(-scores)]
    assert done.stdout.splitlines() == expected, done.stderr
    assert len(command("classify", artifact, "--ids", "5,6").stdout.splitlines()) == 4
    source = write(tmp_path / "in.jsonl", {"text": "x"}, {"ids": [4]})
    assert command("classify", artifact, "--texts", source, "--out", out).returncode == 0
    assert len(out.read_text().splitlines()) == 2
    assert "neither" in command("inspect", artifact, module="export").stdout
    for arguments, words in (
        (["classify", artifact], "--text"),
        (["classify", artifact, "--text", "x", "--ids", "1"], "one of --text"),
        (["classify", artifact, "--texts", source], "--out"),
        (["generate", artifact, "--prompt", "x"], "use classify"),
        (["generate", artifact, "--prompts", source, "--out", tmp_path / "new"], "use classify"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert not (tmp_path / "new").exists()
