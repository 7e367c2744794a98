"""The server's bounds: its queue, deadlines, clients that leave or stall, keys, origins, and how it ends."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
from conftest import baseline, ours

from runtime import load
from runtime.errors import RequestError
from runtime.serve.options import ServeOptions
from runtime.serve.server import bind
from test_serve.chats import ENDLESS
from test_serve.conftest import make_artifact, serving, wait_for

MODEL, SECRET = "doge-3m", "a text that nobody else should read"


@contextmanager
def held(served) -> Iterator[None]:
    """The engine's thread stands still meanwhile."""
    begun, ended = threading.Event(), threading.Event()
    future = served.service.worker.call(lambda: (begun.set(), ended.wait(60)))
    assert begun.wait(60)
    try:
        yield
    finally:
        ended.set()
        future.result(60)


def in_threads(count, ask):
    """The results of `ask(number)`, called in threads at once."""
    found: dict[int, object] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: ask(n)})) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def test_what_the_queue_has_no_room_for_is_told_to_try_again(artifact):
    with serving(load(artifact), slots=2, queue=3) as served:
        with held(served):  # counts as one

            def ask(number):
                return served.post("/v1/completions", {"prompt": f"x{number}", "max_tokens": 4})

            threads, found = in_threads(12, ask)
            wait_for(lambda: len(found) == 8)
            for answer in found.values():
                assert answer.status_code == 429
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                served.client().completions.create(model=MODEL, prompt="x", n=2)
        for thread in threads:
            thread.join(60)
        assert sorted(answer.status_code for answer in found.values()) == [200] * 4 + [429] * 8
        served.settle()
        assert served.post("/v1/completions", {"prompt": ["x"] * 6}).status_code == 400  # which would never fit


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_at_its_deadline(served, stream):
    body = {"prompt": "x", "max_tokens": 400, "deadline": 0.05, "stream": stream}
    with held(served):
        threads, found = in_threads(1, lambda _: served.post("/v1/completions", body))
        wait_for(lambda: served.service.worker.count == 2)
        time.sleep(0.1)
    threads[0].join(60)
    assert found[0].status_code == 504
    assert "0.05 s" in found[0].json()["error"]["message"]
    served.settle()
    assert served.service.scheduler.idle


def test_a_deadline_within_a_stream_is_an_error_event(served):
    with served.client().completions.create(
        model=MODEL, prompt="x", max_tokens=500, stream=True, extra_body={"deadline": 2.0}, logit_bias={"1": -100}
    ) as stream:
        next(stream)
        with held(served):
            time.sleep(2.1)
        with pytest.raises(openai.APIError, match="deadline"):
            list(stream)
    served.settle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(served, stream):
    body = json.dumps({"prompt": "x", "n": 3, "max_tokens": 500, "stream": stream, "logit_bias": {"1": -100}})
    before = served.service.scheduler.counters.new_tokens
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: served.service.scheduler.running == 3)
    served.settle()
    assert served.service.scheduler.idle
    assert served.service.scheduler.running == 0
    assert served.service.scheduler.counters.new_tokens - before < 1500


def test_connections_that_stall_are_closed(artifact):
    with serving(load(artifact), read_timeout=0.5) as served:
        idle, head, body = (socket.create_connection(("127.0.0.1", served.port)) for _ in range(3))
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConte")
        body.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        for client in (idle, head, body):
            client.settimeout(30)
            with suppress(ConnectionResetError):
                assert client.recv(100) == b""
            client.close()
        assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_reader_that_stalls_is_left_and_its_slots_are_free(artifact):
    with serving(load(artifact), read_timeout=0.5, max_choices=64) as served:
        options = {"n": 8, "max_tokens": 500, "logprobs": 20, "stream": True, "logit_bias": {"1": -100}}
        body = json.dumps({"prompt": "x", **options})
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: served.service.scheduler.running)
        served.settle()
        wait_for(lambda: not served.server.server_state.connections)
        client.close()


def test_a_long_prompt_lets_the_others_step(artifact):
    """While a long prompt is computed in pieces, a running sequence gets a token after each."""
    with serving(load(artifact), chunk=32) as served:
        client = served.client()
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=400, stream=True, logit_bias={"1": -100})
        next(iter(stream))
        counters = served.service.scheduler.counters
        before = counters.steps
        served.post("/v1/completions", {"prompt": [5] * 320, "max_tokens": 1})
        assert counters.steps - before >= 9
        stream.close()
        served.settle()


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_computes_only_the_slots_in_use_where_bits_may_differ(tmp_path, exact):
    model = ours(baseline(num_attention_heads=1, num_key_value_heads=1))
    engine = load(make_artifact(tmp_path / "one-head", model, {}))
    assert engine.session.row_multiple > 1
    with serving(engine, exact=exact) as served:
        served.client().completions.create(model="one-head", prompt=[5, 6, 7], max_tokens=4)
        counters = served.service.scheduler.counters
        assert counters.steps > 0
        assert counters.rows == counters.steps * (engine.session.row_multiple if exact else 1)


def test_a_key_is_asked_for(artifact, tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    with serving(load(artifact), api_key_file=tmp_path / "key") as served:
        for key in ("-", "s3cre", "S3cret", "s3cret0"):
            found = served.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert found.status_code == 401
            assert found.json()["error"]["type"] == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        assert served.get("/metrics").status_code == 401
        assert (
            served.get("/health").status_code == served.get("/ready").status_code == served.get("/").status_code == 200
        )
        assert served.client("s3cret").completions.create(model=MODEL, prompt="x", max_tokens=1).choices
    (tmp_path / "key").write_text("\n")
    with pytest.raises(RequestError, match="is empty"):
        ServeOptions(api_key_file=tmp_path / "key").read_key()


def test_pages_of_other_origins_may_call_where_they_are_allowed(served, artifact):
    ask = {"Origin": "http://page.test", "Access-Control-Request-Method": "POST"}
    found = httpx.options(f"{served.url}/v1/completions", headers=ask)
    assert found.status_code == 405
    assert not [name for name in found.headers if name.startswith("access-control")]
    with serving(load(artifact), allow_origin=["http://page.test"]) as other:
        allowed = httpx.options(f"{other.url}/v1/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "http://page.test"
        refused = httpx.options(f"{other.url}/v1/completions", headers={**ask, "Origin": "http://else.test"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_template_that_loops_is_an_error_and_a_lack_of_one_too(artifact, tmp_path):
    from conftest import baseline, ours

    texts = {"tokenizer.json": (artifact / "tokenizer.json").read_bytes()}
    model = ours(baseline(vocab_size=3072), expert_routing="token")
    chat = {"messages": [{"role": "user", "content": "x"}]}
    path = make_artifact(tmp_path / "loops", model, {**texts, "chat_template.jinja": ENDLESS.encode()})
    with serving(load(path)) as served:
        served.service.engine.chat_template.sandbox.seconds = 1.0
        found = served.post("/v1/chat/completions", chat)
        assert found.status_code == 400
        assert "takes more than 1 s" in found.json()["error"]["message"]
        assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
        served.service.engine.chat_template = None
        found = served.post("/v1/chat/completions", chat)
        assert found.status_code == 400
        assert "has no chat template" in found.json()["error"]["message"]


def test_schemas_that_blow_up_are_errors_and_hold_up_nobody(served):
    huge = {"type": "integer", "multipleOf": 10**9 + 7}
    threads, found = in_threads(1, lambda _: served.post("/v1/completions", {"prompt": "x", "guided_json": huge}))
    assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    threads[0].join(60)
    assert found[0].status_code == 400
    assert "the grammar" in found[0].json()["error"]["message"]


def test_a_failed_engine_says_so_and_ends_every_request(artifact, caplog):
    with serving(load(artifact)) as served:

        def fail():
            raise ValueError(SECRET)

        served.service.scheduler.step = fail
        assert served.post("/v1/completions", {"prompt": "x"}).status_code == 500
        assert served.post("/v1/completions", {"prompt": "x"}).status_code == 503
        assert served.get("/health").status_code == served.get("/ready").status_code == 503
        assert served.service.worker.count == 0
    assert "the engine failed: ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_a_defect_is_logged_without_the_request(served, caplog, monkeypatch):
    def fail(*arguments):
        raise KeyError(SECRET)

    monkeypatch.setattr(served.service, "requests", fail)
    with caplog.at_level(logging.DEBUG, "runtime"):
        assert served.post("/v1/completions", {"prompt": SECRET}).status_code == 500
    assert "KeyError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "--port"),
        ({"queue": -1}, "--queue"),
        ({"deadline": 0}, "--deadline"),
        ({"chunk": 0}, "--chunk"),
        ({"read_timeout": float("nan")}, "--read-timeout"),
    ],
)
def test_options_that_make_no_server_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        ServeOptions(**options)


def test_an_address_that_is_taken_is_an_error():
    with bind(ServeOptions(port=0)) as taken, pytest.raises(RequestError, match="cannot listen"):
        bind(ServeOptions(port=taken.getsockname()[1]))


class Command:
    """`wm-run serve` in a process of its own."""

    def __init__(self, artifact, *options: str):
        command = [sys.executable, "-c", "from runtime.cli import main; main()", "serve", str(artifact), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"serving (\S+) at (http://127\.0\.0\.1:(\d+))", line)
        assert found, line
        self.url, self.port = found[2], found[3]
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)

    def end(self, sig: int) -> tuple[int, str]:
        """Its exit code after a signal, and what it said."""
        self.process.send_signal(sig)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


def test_sigterm_lets_running_requests_end_and_refuses_new_ones(artifact):
    command = Command(artifact, "--port", "0")
    body = {"prompt": SECRET, "max_tokens": 450, "n": 3, "stream": True, "logit_bias": {"1": -100}}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{command.url}/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGTERM)
        status = 200
        for _ in range(200):
            status = httpx.post(f"{command.url}/v1/completions", json={"prompt": SECRET, "max_tokens": 1}).status_code
            if status == 503:
                break
        assert status == 503
        assert httpx.get(f"{command.url}/ready").status_code == 503
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in rest) == 3
    said, _ = command.process.communicate(timeout=60)
    assert command.process.returncode == 0
    assert said == ""


def test_ctrl_c_ends_it_with_130(artifact):
    assert Command(artifact, "--port", "0").end(signal.SIGINT) == (130, "")


def test_a_killed_server_starts_again_on_its_port(artifact):
    command = Command(artifact, "--port", "0")
    in_threads(3, lambda _: suppressed(command.url))
    time.sleep(0.3)
    assert command.end(signal.SIGKILL)[0] == -signal.SIGKILL
    again = Command(artifact, "--port", command.port)
    found = httpx.post(f"{again.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
    assert found.json()["usage"]["completion_tokens"] == 3
    assert again.end(signal.SIGTERM)[0] == 0


def suppressed(url):
    """A long request, whose server is killed meanwhile."""
    try:
        return httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 500}, timeout=60).status_code
    except httpx.TransportError:
        return None


def test_the_command_names_what_is_wrong(artifact):
    for options, message in ((["--slots", "9"], "1 to 4"), (["--queue", "-1"], "--queue is -1")):
        command = [sys.executable, "-c", "from runtime.cli import main; main()", "serve", str(artifact), "--port", "0"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


class PanicException(BaseException):
    """What the tokenizers library raises where it panics, by its name."""


class Panics:
    """A tokenizer that reads texts and cannot write one."""

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode

    def decode(self, ids, skip_special_tokens=True):
        raise PanicException("index out of bounds")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/detokenize", {"tokens": [5]}, 400),
        ("/v1/completions", {"prompt": [5, 6], "echo": True, "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 1, "logprobs": 1}, 500),
    ],
)
def test_a_tokenizer_that_panics_fails_its_request_alone(served, monkeypatch, path, body, status):
    tokenizer = served.service.engine.tokenizer
    monkeypatch.setattr(served.service.engine, "tokenizer", Panics(tokenizer))
    answer = served.post(path, body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        status, "tokenizer.json: cannot write the text: index out of bounds"
    )  # fmt: skip
    monkeypatch.undo()
    assert served.get("/health").status_code == 200
    assert served.post("/detokenize", {"tokens": tokenizer.encode("def").ids}).json() == {"prompt": "def"}
