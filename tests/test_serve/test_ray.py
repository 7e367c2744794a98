"""Datasets, and replicas of the server, on a local Ray: a replica is killed under load, and no answer is wrong."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime import load
from runtime.batch import generate_file
from runtime.errors import ArtifactError, RequestError
from runtime.prompts import read_prompts
from runtime.scheduler import Request, Scheduler
from runtime.text.sampling import Sampling

ray = pytest.importorskip("ray", reason="ray is not installed; install with pip install 'wm-models[ray]'")
pytestmark = pytest.mark.slow

from ray import serve  # noqa: E402

from runtime.serve.datasets import LINES, DatasetOptions, generate_dataset  # noqa: E402
from runtime.serve.ray import application, parse, send_no_usage  # noqa: E402
from test_serve.test_readme import blocks  # noqa: E402

PROMPTS = ["def main(", "import ", "class Reader:\n    def ", "for line in lines:\n"]
NEW = 48


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    send_no_usage()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def url(artifact):
    """The address at which two replicas answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application({"artifact": str(artifact), "replicas": "2", "name": "doge"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_usage_is_not_reported():
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()


@pytest.fixture
def lines(tmp_path):
    """A file of two parts, with lines that cannot be answered and values that readers of JSON like to guess."""
    rows = [{"prompt": PROMPTS[index % 4], "at": "2020-01-01", "id": f"00{index}"} for index in range(LINES + 3)]
    texts = [json.dumps(row) for row in rows]
    texts[1], texts[5], texts[7] = "", "{", json.dumps({"prompt": "x", "text": "y"})
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode())
    return path


def test_lines_are_answered_as_without_ray(artifact, alone, lines, tmp_path):
    sampling = Sampling(0.8, seed=3)
    options = DatasetOptions(2, sampling, replicas=2)
    assert generate_dataset(artifact, lines, tmp_path / "out", options) == 2
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == ["part-00000.jsonl", "part-00001.jsonl"]
    for _ in generate_file(alone, read_prompts(alone, lines), tmp_path / "one.jsonl", 2, 4, sampling):
        pass
    found = b"".join(part.read_bytes() for part in parts).splitlines()
    assert sorted(found) == sorted((tmp_path / "one.jsonl").read_bytes().splitlines())
    assert len(found) == LINES + 2

    cut = parts[1].read_bytes()[:-20]  # as a run that was killed leaves it
    parts[1].write_bytes(cut)
    first = parts[0].read_bytes()
    generate_dataset(artifact, lines, tmp_path / "out", DatasetOptions(2, sampling))
    assert parts[0].read_bytes() == first
    assert sorted(b"".join(part.read_bytes() for part in parts).splitlines()) == sorted(found)


def test_rows_keep_their_columns(artifact, alone, tmp_path):
    given = pa.table({"prompt": [*PROMPTS, None], "made": pa.array([1.5, None, 2.5, 3.5, 4.5], pa.float32())})
    pq.write_table(given, tmp_path / "in.parquet", row_group_size=3)
    sampling = Sampling(0.8, seed=3)
    assert generate_dataset(artifact, tmp_path / "in.parquet", tmp_path / "out", DatasetOptions(8, sampling)) == 2
    parts = sorted((tmp_path / "out").iterdir())
    table = pa.concat_tables(pq.read_table(part) for part in parts)
    assert table.select(given.column_names).equals(given)
    assert table["line"].to_pylist() == list(range(5))
    expected = [solo(alone, prompt, 8, Sampling(0.8, seed=3 + line)) for line, prompt in enumerate(PROMPTS)]
    assert table["text"].to_pylist() == [*expected, None]
    assert table["error"].to_pylist() == [None] * 4 + ["expected an object with either a prompt or ids"]


def test_the_example_of_the_documents_runs(artifact, tmp_path, monkeypatch):
    _, program = blocks("python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "doge-3m").symlink_to(artifact)
    exec(program, {})
    assert len((tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()) == 20


def test_the_commands_of_the_documents_have_options_that_there_are():
    commands = [line.split()[3:] for block in blocks("sh") for line in block.splitlines() if "ray:application" in line]
    assert len(commands) == 2
    for words in commands:
        parse(dict(word.split("=") for word in words))


def test_sources_that_are_none_are_refused(artifact, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RequestError, match="is empty"):
        generate_dataset(artifact, tmp_path / "empty.jsonl", tmp_path / "out")
    with pytest.raises(RequestError, match=r"expected a file with the suffix \.jsonl or \.parquet"):
        generate_dataset(artifact, tmp_path / "empty.csv", tmp_path / "out")
    pq.write_table(pa.table({"prompt": ["x"], "error": [1]}), tmp_path / "taken.parquet")
    with pytest.raises(RequestError, match="has the column error"):
        generate_dataset(artifact, tmp_path / "taken.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"artifact": "x", "port": "80"}, "port is an option of Ray's proxy"),
        ({"artifact": "x", "replica": "2"}, "replica is no option; expected one of allow_origin, "),
        ({"replicas": "2"}, "artifact: "),
        ({"artifact": "x", "replicas": "two"}, "replicas: "),
        ({"artifact": "x", "replicas": "0"}, "replicas is 0; expected 1 or more"),
        ({"artifact": "x", "replicas": "3", "max_replicas": "2"}, "max_replicas is 2; expected 3 or more"),
        ({"artifact": "x", "queue": "-1"}, "--queue is -1"),
    ],
)
def test_options_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(RequestError) as refused:
        parse(arguments)
    assert message in str(refused.value)


def test_an_artifact_is_checked_before_it_is_deployed(tmp_path):
    with pytest.raises(ArtifactError):
        application({"artifact": str(tmp_path)})


def test_replicas_follow_the_requests(artifact):
    made = application({"artifact": str(artifact), "replicas": "1", "max_replicas": "3", "queue": "8"})
    deployment = made._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 4)
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (12, 8)


def solo(engine, prompt, new, sampling):
    scheduler = Scheduler(engine)
    scheduler.begin(Request(engine.tokenizer.encode(prompt).ids, new, sampling))
    return "".join(event.text for event in scheduler.run())


def replicas():
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each for each in named if each["name"].startswith("SERVE_REPLICA::default#doge#")]


def test_the_application_is_the_server_s(url):
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "doge"
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "user": "me"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")
    assert "<title>" in httpx.get(url).text


def test_a_stream_arrives(url, alone):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.completions.create(
        model="doge", prompt=PROMPTS[0], max_tokens=NEW, temperature=0.8, seed=1, stream=True
    )
    pieces = [piece.choices[0].text for piece in stream]
    assert "".join(pieces) == solo(alone, PROMPTS[0], NEW, Sampling(0.8, seed=1))
    assert len(pieces) > NEW // 2


def test_another_artifact_is_another_application(url, artifact, tmp_path):
    (tmp_path / "key").write_text("s3cret")
    arguments = {"artifact": str(artifact), "name": "other", "api_key_file": str(tmp_path / "key")}
    serve.run(application(arguments), name="other", route_prefix="/other")
    try:
        assert httpx.get(f"{url}/other/health").json() == {"status": "alive"}
        assert httpx.get(f"{url}/other/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "doge"
        client = openai.OpenAI(base_url=f"{url}/other/v1", api_key="s3cret")
        assert client.models.list().data[0].id == "other"
        assert client.completions.create(model="other", prompt="x", max_tokens=2).usage.completion_tokens == 2
    finally:
        serve.delete("other")


def test_a_replica_that_is_killed_costs_no_request(url, artifact):
    alone = load(artifact)
    expected = {(p, seed): solo(alone, p, NEW, Sampling(0.8, seed=seed)) for p in PROMPTS for seed in range(3)}
    assert len(replicas()) == 2
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")  # as it is, which sends twice again after a 500
    under_way, killed = threading.Semaphore(0), threading.Event()

    def ask(number):
        key = list(expected)[number % len(expected)]
        if number == 24:
            victim = replicas()[0]
            ray.kill(ray.get_actor(victim["name"], victim["namespace"]))
            killed.set()
        under_way.release()
        answer = client.completions.create(model="doge", prompt=key[0], max_tokens=NEW, temperature=0.8, seed=key[1])
        return answer.choices[0].text == expected[key]

    with ThreadPoolExecutor(8) as pool:
        right = [done.result() for done in as_completed([pool.submit(ask, number) for number in range(96)])]
    assert killed.is_set()
    assert right == [True] * 96
    until = time.monotonic() + 120
    while serve.status().applications["default"].deployments["doge"].replica_states != {"RUNNING": 2}:
        assert time.monotonic() < until, serve.status()
        time.sleep(0.5)
