"""Continuous batching: sequences come and go without touching the others, and a file of prompts can be resumed."""

import json

import numpy as np
import pytest
from test_export.conftest import save_checkpoint

from export import OnnxOptions, export_onnx
from runtime import RequestError, load
from runtime.batch import generate_file, generate_many
from runtime.prompts import Prompt, finished_lines, read_prompts
from runtime.text.sampling import Sampling


@pytest.fixture(scope="module", params=[None, "int8"])
def directory(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("batch")
    save_checkpoint(root / "checkpoint", tokenizer=True, logit_scale=0.5, vocab_size=32768, eos_token_id=None)
    export_onnx(root / "checkpoint", root / "artifact", OnnxOptions(max_batch=3, quantize=request.param))
    return root / "artifact"


@pytest.fixture
def engine(directory):
    return load(directory, threads=2)


def some_prompts(count=9):
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 60, count)
    return [Prompt(line, {}, draw.integers(0, 32768, size).tolist()) for line, size in enumerate(sizes)]


def test_others_stay_as_they_are_to_the_bit(engine):
    """One sequence through 40 steps, alone and while others join, leave and idle beside it, and need more capacity."""
    draw = np.random.default_rng(1)
    first, ids = draw.integers(0, 32768, 20).tolist(), draw.integers(0, 32768, (40, 3))
    runs, capacities = [], []
    for company in (False, True):
        engine.reserve(3, 200)
        rows = [engine.join(1, first).copy()]
        for step in range(40):
            if company and step % 9 == 4:
                engine.join(step % 2 * 2, draw.integers(0, 32768, 30 + step).tolist())
            if company and step % 9 == 8:
                engine.leave(0)
            active = (engine.lengths > 0).astype(np.int64)
            rows.append(engine.prefill(ids[step][:, None], active)[1].copy())
        runs.append(np.stack(rows))
        capacities.append(engine.session.capacity)
    assert capacities == [64, 128]
    np.testing.assert_array_equal(runs[0], runs[1])


def test_what_a_prompt_gets_does_not_depend_on_its_company(engine):
    prompts = some_prompts()
    options = {"max_new_tokens": 12, "slots": 3, "sampling": Sampling(0.8, seed=5)}
    whole = {prompt.line: new for prompt, new in generate_many(engine, prompts, **options)}
    assert sorted(whole) == list(range(9))
    for prompt in prompts[::3]:
        assert list(generate_many(engine, [prompt], **options)) == [(prompt, whole[prompt.line])]


def test_greedy_is_one_by_one(engine):
    for prompt, new in generate_many(engine, some_prompts(), 10, 3):
        assert len(new) == 10
        alone = load(engine.artifact.path).generate_ids(prompt.ids, 10) if prompt.line == 3 else new
        assert alone == new


def test_a_file_is_resumed(engine, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "def main(", "name": "a"}, {"ids": [1, 2, 3]}, {"prompt": "import é"}, {"prompt": "x = "}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(engine, source)
    assert sorted(generate_file(engine, prompts, out, 6, 2)) == [0, 1, 2, 3]
    whole = {answer["line"]: answer for answer in map(json.loads, out.read_text().splitlines())}
    assert whole[0]["name"] == "a"
    assert whole[0]["text"] == engine.tokenizer.decode(whole[0]["new_ids"])
    first = out.read_bytes().split(b"\n")[0] + b"\n"
    out.write_bytes(first + b'{"prompt": "x = ", "li')  # as if stopped while writing
    assert len(list(generate_file(engine, prompts, out, 6, 2))) == 4
    assert {answer["line"]: answer for answer in map(json.loads, out.read_text().splitlines())} == whole
    before = out.read_bytes()
    assert finished_lines(out, prompts) == {0, 1, 2, 3}
    assert len(list(generate_file(engine, prompts, out, 6, 2))) == 4
    assert out.read_bytes() == before
    source.write_text(source.read_text().replace("import", "export"))
    prompts = read_prompts(engine, source)
    with pytest.raises(RequestError, match=r"answers no line.*--out"):
        finished_lines(out, prompts)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: is no JSON"),
        ("[]", "line 1: expected an object"),
        ('{"prompt": "x", "ids": [1]}', "line 1: expected an object with either"),
        ('{"ids": [1, "2"]}', "line 1: ids are"),
        ('{"ids": [40000]}', "line 1: token id 40000"),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ('{"prompt": 5}', "line 1: prompt is int"),
        ('{"prompt": "x", "text": "mine"}', "line 1: has text, which is what its answer adds"),
        ("", "is empty"),
    ],
)
def test_file_errors(engine, tmp_path, line, words):
    path = tmp_path / "in.jsonl"
    path.write_text(line)
    with pytest.raises(RequestError, match=words):
        read_prompts(engine, path, strict=True)


def test_join_errors(engine):
    with pytest.raises(RequestError, match="slot is 0"):
        engine.join(0, [1])
    engine.reserve(2, 20)
    with pytest.raises(RequestError, match="empty"):
        engine.join(0, [])
    with pytest.raises(RequestError, match="513 tokens"):
        engine.join(0, [1] * 513)
