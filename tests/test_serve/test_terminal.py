"""`wm-run chat`, `--json-schema`, and the engine's own calls for chats and JSON."""

import json
import subprocess
import sys

import jsonschema
import pytest

from runtime import Request, RequestError, Sampling, load, regex
from test_serve.chats import CONVERSATIONS

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


def wm_run(*arguments: object, entered: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from runtime.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, input=entered, capture_output=True, text=True, timeout=120, check=False)


def prompt_of(engine, messages):
    """What the artifact's template, ChatML, makes of messages."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    return engine.tokenizer.encode(text, add_special_tokens=False).ids


def test_a_chat_continues_the_templates_prompt(alone):
    messages, sampling = CONVERSATIONS["three turns"], Sampling(0.9, seed=3)
    expected = [event.text for event in alone.events(Request(prompt_of(alone, messages), 20, sampling))]
    assert "".join(alone.chat(messages, 20, sampling=sampling)) == "".join(expected)
    assert "".join(alone.chat(messages, 20, grammar=regex("(ab){2}"))) == "abab"
    stopped = "".join(alone.chat(messages, 20, sampling=sampling, stop="".join(expected)[3:5]))
    assert stopped == "".join(expected)[: "".join(expected).index("".join(expected)[3:5])]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_generated_json_meets_its_schema_or_is_an_error(alone, temperature):
    text = alone.generate_json("x = ", SCHEMA, 150, sampling=Sampling(temperature, seed=1))
    jsonschema.validate(json.loads(text), SCHEMA)
    with pytest.raises(RequestError, match="not finished after 3 tokens"):
        alone.generate_json("x = ", json.dumps(SCHEMA), 3)


def test_a_classifier_and_an_artifact_without_a_template_do_not_chat(classifier, alone, monkeypatch):
    with pytest.raises(RequestError, match="is a classifier"):
        load(classifier).chat(CONVERSATIONS["one turn"])
    monkeypatch.setattr(alone, "chat_template", None)
    with pytest.raises(RequestError, match="has no chat template"):
        alone.chat(CONVERSATIONS["one turn"])


def test_the_terminal_talks_turn_by_turn(artifact, alone):
    done = wm_run("chat", artifact, "--system", "Be short.", "--max-new-tokens", 10, "--temperature", 0,
                  entered="Hello\nAgain\n/exit\nnever read\n")  # fmt: skip
    assert done.returncode == 0, done.stderr
    messages, answers = [{"role": "system", "content": "Be short."}], []
    for said in ("Hello", "Again"):
        messages.append({"role": "user", "content": said})
        events = list(alone.events(Request(prompt_of(alone, messages), 10)))
        answers.append("".join(event.text for event in events))
        messages.append({"role": "assistant", "content": answers[-1]})
    begin = "/exit leaves, Ctrl-C ends an answer\n"
    assert done.stdout == f"{begin}> {answers[0]}\n> {answers[1]}\n> "


def test_the_end_of_the_input_ends_the_conversation(artifact):
    assert wm_run("chat", artifact).returncode == 0


def test_a_schema_from_a_file(artifact, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    given = ["generate", artifact, "--prompt", "x = ", "--temperature", 2, "--json-schema", tmp_path / "schema.json"]
    done = wm_run(*given)
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    for more, message in ((["--max-new-tokens", 2], "not finished"), (["--stop", "x"], "without --stop")):
        done = wm_run(*given, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
    (tmp_path / "schema.json").write_text("{")
    assert wm_run(*given).returncode == 2
