"""Guesses behind the server and the programs: callers get the ordinary answers, and the metrics count the guesses."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from runtime import load
from runtime.speculation.costs import Costs
from test_serve.conftest import serving
from test_serve.test_terminal import wm_run

MODEL = "doge-3m"
EARLIER = Path(__file__).parents[1] / "data" / "artifact-schema-1"  # a graph without `logits_index`
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}, "required": ["name"]}
REPEATED = "    first = values.pop()\n    second = values.pop()\n" * 6
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
ASKED = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 4},
    {"temperature": 0, "stop": ["pop"]},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.0, "seed": 2, "response_format": FORMAT},
    {"temperature": 0, "max_tokens": 1},
]


def answers(served):
    """What the callers get, all of them asking at once."""

    def ask(options):
        body = {"model": MODEL, "prompt": REPEATED, "max_tokens": 40, **options}
        return served.post("/v1/completions", body).json()["choices"][0]

    with ThreadPoolExecutor(len(ASKED)) as pool:
        return list(pool.map(ask, ASKED))


def test_callers_get_the_ordinary_answers(artifact):
    with serving(load(artifact)) as served:
        expected = answers(served)
    engine = load(artifact)
    engine.speculate()
    assert engine.speculation is not None
    engine.speculation = replace(engine.speculation, costs=Costs((1.0, 1.02)))
    with serving(engine) as served:
        found = answers(served)
        lines = dict(line.rsplit(" ", 1) for line in served.get("/metrics").text.splitlines() if line[0] != "#")
    for one, other, options in zip(found, expected, ASKED, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"]), options
        if "logprobs" in options:
            assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
            assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
        if "response_format" in options and one["finish_reason"] == "stop":
            jsonschema.validate(json.loads(one["text"]), SCHEMA)
    assert 0 < float(lines["wm_accepted_tokens"]) <= float(lines["wm_proposed_tokens"])


@pytest.mark.parametrize("how", [["--speculate", "ngram", "--guesses", 4], ["--draft"]])
def test_wm_run_generates_the_same_text(artifact, how):
    asked = ["generate", artifact, "--prompt", REPEATED, "--max-new-tokens", 30]
    plain = wm_run(*asked)
    ahead = wm_run(*asked, *how, *([artifact] if how == ["--draft"] else []))
    assert (plain.returncode, ahead.returncode) == (0, 0), ahead.stderr
    assert ahead.stdout == plain.stdout


@pytest.mark.parametrize(("directory", "how", "said"), [
    (EARLIER, ["--speculate", "ngram"], "speculation needs logits of several tokens a step; export it again"),
    (None, ["--speculate", "medusa"], "speculation is by 'medusa'; expected ngram or an engine"),
    (None, ["--speculate", "ngram", "--draft", EARLIER], "expected one of --speculate and --draft"),
    (None, ["--draft", EARLIER], "expected a draft over the same tokenizer"),
])  # fmt: skip
def test_what_wm_run_refuses(artifact, directory, how, said):
    done = wm_run("generate", directory or artifact, "--ids", "5", *how)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
