"""Files of prompts: what ends a line, what one bad line does, and how a run is resumed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from runtime import RequestError, generate_file, load, read_prompts
from runtime.cli import app
from runtime.prompts import Prompt, append_answers, finished_lines

SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"


@pytest.fixture(scope="module")
def engine():
    return load(SMALL, "cpu")


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def answers(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def run(engine, source, out, **options):
    prompts = read_prompts(engine, source, strict=options.get("strict", False))
    return list(generate_file(engine, prompts, out, 3, 2, **options))


def test_lines_end_at_a_line_feed_alone(engine, paths):
    """U+2028, U+2029, U+0085 and others are characters of a JSON string; blank lines and a mark are nothing."""
    source, out = paths
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "i"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    source.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode() + b"\r\n \n")
    prompts = read_prompts(engine, source)
    assert [prompt.line for prompt in prompts] == [0, 2, 4, 6]
    assert [prompt.given["prompt"] for prompt in prompts] == texts
    assert sorted(run(engine, source, out)) == [0, 2, 4, 6]
    assert {answer["line"]: answer["prompt"] for answer in answers(out)} == dict(zip((0, 2, 4, 6), texts, strict=True))
    before = out.read_bytes()
    assert run(engine, source, out) == [0, 2, 4, 6]
    assert out.read_bytes() == before


BAD = [
    "{", "[]", "5", '{"prompt": "x", "ids": [1]}', "{}", '{"ids": [5, "2"]}', '{"ids": [5.5]}', '{"ids": [true]}',
    '{"ids": "5"}', '{"ids": null}', '{"ids": [40000]}', '{"ids": []}', '{"prompt": 5}', '{"prompt": ""}',
    '{"prompt": "x", "text": 1}', '{"prompt": "x", "line_hash": 1}', json.dumps({"ids": [5] * 300}),
    '{"prompt": "\\ud800"}', '{"prompt": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "\udcff",
    '{"prompt": "x", "n": ' + "1" * 10_000 + "}",
]  # fmt: skip


def test_a_bad_line_gets_an_error_and_the_others_go_on(engine, paths):
    source, out = paths
    sound = json.dumps({"ids": [5, 6]})
    source.write_bytes("\n".join([sound, *BAD, sound]).encode("utf-8", "surrogateescape"))
    assert sorted(run(engine, source, out)) == list(range(len(BAD) + 2))
    found = {answer["line"]: answer for answer in answers(out)}
    assert found[0]["new_ids"] == found[len(BAD) + 1]["new_ids"] == engine.generate_ids([5, 6], 3)
    for line in range(1, len(BAD) + 1):
        assert found[line].keys() == {"line", "line_hash", "error"}, BAD[line - 1][:60]
        assert found[line]["error"]
    before = out.read_bytes()
    assert len(run(engine, source, out)) == len(BAD) + 2
    assert out.read_bytes() == before


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20])
def test_strict_stops_at_a_bad_line(engine, paths, line):
    source, out = paths
    source.write_bytes(("{}\n" if line == "{}" else f'{{"ids": [5]}}\n{line}').encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError, match=r"in\.jsonl: line [12]: "):
        run(engine, source, out, strict=True)
    assert not out.exists()


class Overflowing:
    """A session whose logits are not finite for prompts that begin with token 9."""

    def __init__(self, session):
        self.session = session

    def __getattr__(self, name):
        return getattr(self.session, name)

    def step_slot(self, slot, input_ids, *rest, **options):
        found = self.session.step_slot(slot, input_ids, *rest, **options)
        return np.full_like(found, np.nan if found.dtype.kind == "f" else -1) if input_ids[0] == 9 else found


def test_logits_that_are_not_finite_are_one_line_s_error(paths):
    source, out = paths
    source.write_text('{"ids": [5]}\n{"ids": [9]}\n{"ids": [6]}\n')
    engine = load(SMALL, "cpu")
    engine.session = Overflowing(engine.session)
    assert sorted(run(engine, source, out)) == [0, 1, 2]
    found = {answer["line"]: answer for answer in answers(out)}
    assert "not finite" in found[1]["error"]
    assert len(found[0]["new_ids"]) == len(found[2]["new_ids"]) == 3
    out.unlink()
    with pytest.raises(RequestError, match=r"line 2: .*not finite"):
        run(engine, source, out, strict=True)


def test_extra_fields_come_back_as_they_were(engine, paths):
    source, out = paths
    lines = ['{"ids": [5], "x": "\\ud83d"}', '{"ids": [5], "x": NaN}', '{"ids": [5], "x": "\\ud83d\\ude00 é"}']
    source.write_text("\n".join(lines))
    assert sorted(run(engine, source, out)) == [0, 1, 2]
    text = out.read_text("utf-8")
    assert '"x": "\\ud83d"' in text
    assert '"x": "😀 é"' in text
    before = out.read_bytes()
    assert run(engine, source, out) == [0, 1, 2]
    assert out.read_bytes() == before


extras = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(extras, min_size=1, max_size=4))
def test_any_record_is_written_and_found_again(tmp_path_factory, values):
    out = tmp_path_factory.mktemp("out") / "out.jsonl"
    prompts = [
        Prompt(line, {"x": value}, [5], hashlib.sha256(str(line).encode()).hexdigest()[:16])
        for line, value in enumerate(values)
    ]
    assert list(append_answers(out, ((prompt, {"new_ids": []}) for prompt in prompts))) == list(range(len(values)))
    assert finished_lines(out, prompts) == set(range(len(values)))
    assert repr([answer["x"] for answer in answers(out)]) == repr(values)


def test_answers_of_other_prompts_are_not_taken(engine, paths):
    source, out = paths
    source.write_text('{"ids": [5]}\n{"ids": [6]}\n')
    run(engine, source, out)
    prompts = read_prompts(engine, source)
    for others in (prompts[:1], [prompts[0], replace(prompts[1], line_hash="0" * 16)]):
        with pytest.raises(RequestError, match=r"out\.jsonl: line 2 answers no line of the prompts; choose another"):
            finished_lines(out, others)
    out.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(RequestError, match="line 1 answers no line"):
        finished_lines(out, prompts)


def test_the_command(engine, paths):
    source, out = paths
    source.write_text('{"ids": [5]}\n{\n')
    arguments = ["generate", str(SMALL), "--prompts", str(source), "--out", str(out), "--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [*arguments, "--strict"])
    assert "line 2: is no JSON" in str(done.exception)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert {answer["line"] for answer in answers(out)} == {0, 1}
    done = CliRunner().invoke(app, ["generate", str(SMALL), "--ids", "5", "--strict"])
    assert "--strict with them alone" in str(done.exception)
