"""The server through the OpenAI client: what it answers equals the engine's own answers."""

import json
import math
import threading

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from runtime import load
from runtime.scheduler import Request, Scheduler
from runtime.text.labels import label_scores
from runtime.text.sampling import Sampling
from test_serve.chats import CONVERSATIONS
from test_serve.conftest import serving

MODEL, PROMPT = "doge-3m", "def main("
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def solo(alone):
    """`solo(prompt, …)`: the events of a request that runs alone."""
    scheduler = Scheduler(alone)

    def run(prompt, most=16, **options):
        ids = alone.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        scheduler.begin(Request(ids, most, **options))
        return list(scheduler.run())

    return run


def text(events):
    return "".join(event.text for event in events)


def test_models_are_listed(client, served):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")
    assert served.get("/health").json() == {"status": "alive"}
    assert served.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_the_solo_run(client, solo, temperature):
    found = client.completions.create(model=MODEL, prompt=PROMPT, temperature=temperature, seed=5, max_tokens=24)
    expected = solo(PROMPT, 24, sampling=Sampling(temperature, seed=5))
    assert found.choices[0].text == text(expected)
    assert found.choices[0].finish_reason == expected[-1].finish_reason
    assert found.usage.completion_tokens == expected[-1].new_tokens
    assert found.usage.prompt_tokens == expected[-1].prompt_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_sampling_options_reach_the_sampler(client, solo):
    options = {"top_k": 7, "repetition_penalty": 1.3}
    found = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0.8, top_p=0.9, seed=-3, max_tokens=20, extra_body=options
    )
    sampling = Sampling(0.8, 7, 0.9, 1.3, seed=-3 % (1 << 64))
    assert found.choices[0].text == text(solo(PROMPT, 20, sampling=sampling))


def test_prompts_may_be_ids_and_several_and_have_n_choices(client, solo, alone):
    ids = alone.tokenizer.encode(PROMPT).ids
    for prompt, rows in ((ids, [ids]), ([PROMPT, "import "], [PROMPT, "import "]), ([ids, ids[:2]], [ids, ids[:2]])):
        found = client.completions.create(model=MODEL, prompt=prompt, n=2, seed=1, temperature=1, max_tokens=8)
        assert [choice.index for choice in found.choices] == list(range(2 * len(rows)))
        for choice in found.choices:
            sampling = Sampling(1.0, seed=1 + choice.index)
            assert choice.text == text(solo(rows[choice.index // 2], 8, sampling=sampling))
        lengths = [len(row) if isinstance(row, list) else len(alone.tokenizer.encode(row).ids) for row in rows]
        assert found.usage.prompt_tokens == sum(lengths)


def test_a_stream_has_the_same_text_and_its_usage(client, solo):
    for n in (1, 3):
        whole = client.completions.create(model=MODEL, prompt=PROMPT, n=n, seed=2, temperature=1, max_tokens=12)
        texts, reasons, last = [""] * n, [[] for _ in range(n)], None
        for chunk in client.completions.create(
            model=MODEL, prompt=PROMPT, n=n, seed=2, temperature=1, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        ):  # fmt: skip
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index].append(choice.finish_reason)
            last = chunk
        assert texts == [choice.text for choice in whole.choices]
        assert last.choices == []
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        for index, found in enumerate(reasons):
            assert found[-1] == whole.choices[index].finish_reason
            assert set(found[:-1]) <= {None}


def test_stop_strings_end_a_text_before_them(client, solo):
    whole = text(solo(PROMPT, 24))
    for stop in (whole[6:9], [whole[10:12], "never"]):
        found = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=24, stop=stop)
        first = stop if isinstance(stop, str) else stop[0]
        assert found.choices[0].text == whole[: whole.index(first)]
        assert found.choices[0].finish_reason == "stop"


def test_a_bias_bans_and_forces_tokens(client, alone):
    best = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logprobs=0)
    token = alone.tokenizer.encode(best.choices[0].text).ids[0]
    other = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=1, logit_bias={str(token): -100}
    )
    assert other.choices[0].text != best.choices[0].text
    forced = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=3, logit_bias={"300": 100})
    assert forced.choices[0].text == alone.tokenizer.decode([300] * 3)


def test_logprobs_of_a_completion_are_the_models(client, solo, alone):
    found = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=1, seed=4, max_tokens=6, logprobs=3, echo=True
    ).choices[0]
    ids = alone.tokenizer.encode(PROMPT).ids
    new = [event.token for event in solo(PROMPT, 6, sampling=Sampling(1.0, seed=4))]
    known = found.logprobs
    assert found.text.startswith(PROMPT)
    assert "".join(known.tokens) == found.text
    assert known.text_offset == [len("".join(known.tokens[:at])) for at in range(len(known.tokens))]
    assert known.token_logprobs[0] is None
    alone.reset()
    logits = [alone.prefill(np.array([[token]]))[0].astype(np.float64) for token in ids + new]
    for at, token in enumerate((ids + new)[1:], 1):
        row = logits[at - 1] - np.logaddexp.reduce(logits[at - 1])
        assert math.isclose(known.token_logprobs[at], row[token], abs_tol=1e-4)
        assert math.isclose(max(known.top_logprobs[at].values()), row.max(), abs_tol=1e-4)
        assert len(known.top_logprobs[at]) == 3


def test_a_prompt_can_be_scored_alone(client):
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    assert found.choices[0].text == PROMPT
    assert found.usage.completion_tokens == 0
    assert len(found.choices[0].logprobs.tokens) == found.usage.prompt_tokens
    streamed = list(client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=1, echo=True, stream=True
    ))  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT
    assert streamed[0].choices[0].logprobs == found.choices[0].logprobs


def chat_prompt(messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


def test_a_chat_is_the_completion_of_its_prompt(client, solo):
    messages = CONVERSATIONS["three turns"]
    expected = solo(chat_prompt(messages), 20, sampling=Sampling(0.7, seed=9))
    found = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0.7, seed=9, max_completion_tokens=20, logprobs=True, top_logprobs=2
    )
    choice = found.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == text(expected)
    assert choice.finish_reason == expected[-1].finish_reason
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(bytes(entry.bytes).decode() == entry.token for entry in choice.logprobs.content if entry.bytes)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    again = client.chat.completions.create(model=MODEL, messages=parts, temperature=0.7, seed=9, max_tokens=20)
    assert again.choices[0].message.content == choice.message.content


def test_a_chat_streams_deltas_that_the_client_puts_together(client):
    messages = CONVERSATIONS["system"]
    options = {"model": MODEL, "messages": messages, "temperature": 0, "max_completion_tokens": 15}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(**options, extra_body={"guided_regex": "(ab){3}"}) as stream:
        final = stream.get_final_completion()  # which the client refuses where the end is "length"
    assert final.choices[0].message.content == "ababab"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_constrained_output_parses_or_says_length(client, temperature):
    asked = [{"role": "user", "content": "A person."}]
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    found = client.chat.completions.create(
        model=MODEL, messages=asked, temperature=temperature, seed=1, n=4, max_tokens=200, response_format=form
    )
    for choice in found.choices:
        if choice.finish_reason != "length":
            jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert any(choice.finish_reason == "stop" for choice in found.choices)
    found = client.chat.completions.create(
        model=MODEL, messages=asked, temperature=temperature, seed=1, max_tokens=2, response_format=form
    )
    assert found.choices[0].finish_reason == "length"
    for name, value in (("guided_regex", "(ab){2,3}c"), ("guided_grammar", 'start: "x" start "y" | "z"')):
        found = client.completions.create(
            model=MODEL, prompt="x", temperature=temperature, max_tokens=60, extra_body={name: value}
        ).choices[0]
        if name == "guided_regex":
            assert found.text in ("ababc", "abababc")
        elif found.finish_reason == "stop":
            depth = found.text.count("x")
            assert found.text == "x" * depth + "z" + "y" * depth


def test_a_json_object_is_one(client):
    found = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "json"}], temperature=0, max_tokens=300,
        response_format={"type": "json_object"}, logit_bias={str(token): -5 for token in (3,)},
    ).choices[0]  # fmt: skip
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)
    assert found.message.content.lstrip().startswith("{")


def test_tokens_and_back(served, alone):
    found = served.post("/tokenize", {"prompt": "def main(): é"}).json()
    assert found["tokens"] == alone.tokenizer.encode("def main(): é").ids
    assert found["count"] == len(found["tokens"])
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "def main(): é"}
    chat = served.post("/tokenize", {"messages": CONVERSATIONS["one turn"]}).json()
    assert chat["tokens"] == alone.tokenizer.encode(chat_prompt(CONVERSATIONS["one turn"])).ids


REFUSED = [
    ("completions", {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "best_of": 3}, "best_of"),
    ("completions", {"prompt": "x", "user": "me"}, "user"),
    ("completions", {"prompt": "x", "tempreature": 1}, "tempreature"),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature"),
    ("completions", {"prompt": "x", "temperature": True}, "temperature"),
    ("completions", {"prompt": "x", "top_p": 1.5}, "top_p"),
    ("completions", {"prompt": "x", "top_k": -1}, "top_k"),
    ("completions", {"prompt": "x", "n": 0}, "n"),
    ("completions", {"prompt": "x", "n": 10**6}, "n"),
    ("completions", {"prompt": ["x"] * 20}, "prompt"),
    ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ("completions", {"prompt": "x", "logprobs": 1000}, "logprobs"),
    ("completions", {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"prompt": "x", "stop": ["a", ""]}, "stop"),
    ("completions", {"prompt": "x", "stop": ["a"] * 50}, "stop"),
    ("completions", {"prompt": "x", "stream": "yes"}, "stream"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"prompt": "x", "guided_regex": "(("}, "grammar"),
    ("completions", {"prompt": "x", "guided_regex": "a", "guided_json": {}}, "guided_json"),
    ("completions", {"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": [[1], "x", 3]}, "prompt"),
    ("completions", {"prompt": [99999]}, "token id 99999"),
    ("completions", {"prompt": [1] * 600}, "tokens"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"content": "x"}]}, "role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "chat_template": "x"}, "chat_template"),
    ("embeddings", {"input": "x"}, "embeddings"),
    ("classify", {"input": "x"}, "language model"),
]


@pytest.mark.parametrize(("path", "body", "named"), REFUSED)
def test_what_is_not_obeyed_is_refused_by_name(served, path, body, named):
    found = served.post(f"/v1/{path}", {"model": MODEL, **body})
    assert found.status_code == 400
    error = found.json()["error"]
    assert named in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert str(served.service.engine.artifact.path) not in error["message"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a\nb\ud800": 1}, r'"a\nb\ud800" is no argument of this request'),
        ({"temperature": "\ud800"}, r'temperature is "\ud800"; expected a number from 0 to 100'),
    ],
    ids=["name", "value"],
)
def test_what_no_answer_can_hold_is_escaped(served, changes, message):
    """Half a surrogate pair is JSON, and no UTF-8."""
    content = json.dumps({"model": MODEL, "prompt": "x", **changes})
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers, timeout=120)
    assert found.status_code == 400
    assert found.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "x", "temperature": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b" " * (5 << 20), "application/json", 413),
    ],
)
def test_bodies_that_are_none(served, content, kind, status):
    found = httpx.post(f"{served.url}/v1/completions", content=content, headers={"Content-Type": kind}, timeout=60)
    assert found.status_code == status
    assert found.json()["error"]["message"]


def test_paths_that_are_none(served):
    assert served.get("/v1/nothing").status_code == 404
    assert served.get("/v1/completions").status_code == 405
    assert "error" in served.get("/v1/nothing").json()


def test_a_classifier_is_served(classifier):
    engine = load(classifier)
    texts = ["a text", "another one, longer"]
    with serving(engine) as served:
        found = served.post("/v1/classify", {"model": "classifier", "input": texts}).json()
        ids = [engine.tokenizer.encode(text).ids for text in texts]
        one = served.post("/v1/classify", {"input": ids[0]}).json()
        refused = served.post("/v1/completions", {"prompt": "x"})
    expected = label_scores(engine.artifact, load(classifier).classify(ids))
    for entry, scores in zip(found["data"], expected, strict=True):
        assert entry["probs"] == pytest.approx(scores.tolist(), abs=1e-6)
        assert entry["label"] == engine.labels[int(scores.argmax())]
        assert entry["num_classes"] == 3
    assert one["data"][0]["probs"] == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert refused.status_code == 400
    assert "classifier" in refused.json()["error"]["message"]


def test_metrics_count_what_was_served(artifact):
    with serving(load(artifact), chunk=64) as served:
        client, prompt = served.client(), "x = 1\n" * 60
        for _ in range(2):
            client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5)
        served.post("/v1/completions", {"prompt": "x", "n": 0})
        lines = dict(line.rsplit(" ", 1) for line in served.get("/metrics").text.splitlines() if line[0] != "#")
        state = served.get("/state").json()
    count = len(load(artifact).tokenizer.encode(prompt).ids)
    assert float(lines['wm_requests_total{path="/v1/completions",status="200"}']) == 2
    assert float(lines['wm_requests_total{path="/v1/completions",status="400"}']) == 1
    assert float(lines["wm_prompt_tokens_total"]) == 2 * count
    assert float(lines["wm_new_tokens_total"]) == 10
    assert float(lines["wm_cache_hits_total"]) == 1
    assert 0 < float(lines["wm_reused_tokens_total"]) < count
    assert float(lines["wm_first_token_seconds_count"]) == 2
    assert float(lines["wm_next_token_seconds_count"]) == 8
    assert float(lines["wm_slots"]) == 4
    assert float(lines["wm_slots_in_use"]) == float(lines["wm_queue"]) == 0
    assert state["new_tokens"] == 10


def test_callers_at_once_get_their_solo_runs(client, solo, served):
    prompts = [f"def function_{number}(" for number in range(10)]
    found: dict[int, str] = {}

    def ask(number):
        answer = client.completions.create(
            model=MODEL, prompt=prompts[number], temperature=1, seed=number, max_tokens=20 + number
        )
        found[number] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, prompt in enumerate(prompts):
        assert found[number] == text(solo(prompt, 20 + number, sampling=Sampling(1.0, seed=number)))
    assert served.service.worker.count == 0
