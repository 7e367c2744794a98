"""A server under clients that misbehave: `python -m test_serve.faults ARTIFACT --requests 10000`.

It starts `wm-run serve`, sends requests of random sizes, of which one in five leaves early, one in fifty stalls or is
malformed, kills the server once and starts it again, and then says what it found. Whole answers are compared with those
of an engine in this process.
"""

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from runtime import load
from runtime.scheduler import Request, Scheduler
from runtime.text.sampling import Sampling

PROMPTS = ["def main(", "import ", "class Reader:\n    def ", "x = [\n" * 40, "for line in lines:\n" * 30]
LENGTHS, SEEDS = (1, 5, 30, 90), (0, 1)
MALFORMED = [b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "x", "n": -1}', b"\xff" * 100, b'{"prompt": "x", "nope": 1}']


@dataclass
class Found:
    """What the clients saw. `wrong`: answers that are not those of the engine alone, and statuses nobody should see."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, after the first fifth and at times from then on

    @property
    def growth(self) -> float:
        """How much more memory the last quarter of the time took at the most than the first one, as a share."""
        quarter = max(1, len(self.memory) // 4)
        return max(self.memory[-quarter:]) / max(self.memory[:quarter]) - 1 if self.memory else 0.0


class Process:
    """`wm-run serve` in a process of its own."""

    def __init__(self, artifact: Path, port: int = 0):
        code = "from runtime.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(artifact), "--port", str(port), "--queue", "16",
             "--read-timeout", "2", "--max-body", str(1 << 20)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        assert match is not None, said
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            try:
                httpx.get(f"{self.url}/ready").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError("the server does not get ready")

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return int(found[1]) << 10 if found else 0

    def state(self) -> dict[str, int]:
        return httpx.get(f"{self.url}/state", timeout=30).json()


def expected_texts(artifact: Path) -> dict[tuple[str, int, int], str]:
    """The text of each prompt, length and seed, by an engine alone."""
    engine, made = load(artifact), {}
    scheduler = Scheduler(engine)
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt).ids
        for length in LENGTHS:
            for seed in SEEDS:
                scheduler.begin(Request(ids, length, Sampling(0.8, seed=seed)))
                made[prompt, length, seed] = "".join(event.text for event in scheduler.run())
    return made


class Client:
    """One caller, whose choices `seed` decides."""

    def __init__(self, url: str, expected: dict[tuple[str, int, int], str], found: Found, seed: int):
        self.url, self.expected, self.found, self.draw = url, expected, found, random.Random(seed)
        self.http = httpx.Client(timeout=60)
        kinds = {self.whole: 50, self.stream: 25, self.leave: 20, self.constrained: 3, self.malformed: 1,
                 self.large: 0.3, self.stall: 0.4, self.half_open: 0.3}  # fmt: skip
        self.kinds, self.weights = list(kinds), list(kinds.values())

    def ask(self) -> None:
        """Send one request."""
        self.attempt(self.draw.choices(self.kinds, self.weights)[0])

    def attempt(self, kind: Callable[[], None]) -> None:
        try:
            kind()
        except (httpx.TransportError, ConnectionError):
            self.found.outcomes["connection lost"] += 1

    def _body(self, **more: object) -> tuple[dict[str, object], str]:
        key = self.draw.choice(list(self.expected))
        prompt, length, seed = key
        body = {"prompt": prompt, "max_tokens": length, "seed": seed, "temperature": 0.8, **more}
        return body, self.expected[key]

    def _check(self, status: int, said: str | None, expected: str, what: str) -> None:
        self.found.outcomes[f"{what} {status}"] += 1
        if status not in (200, 429) or (status == 200 and said != expected):
            self.found.wrong.append(f"{what}: status {status}, {said!r:.80} in place of {expected!r:.80}")

    def whole(self) -> None:
        body, expected = self._body()
        answer = self.http.post(f"{self.url}/v1/completions", json=body)
        said = answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
        self._check(answer.status_code, said, expected, "whole")

    def stream(self) -> None:
        body, expected = self._body(stream=True)
        with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        said = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        self._check(answer.status_code, said, expected, "stream")

    def leave(self) -> None:
        stream = self.draw.random() < 0.5
        body, _ = self._body(stream=stream, n=self.draw.randint(1, 3))
        text = json.dumps({**body, "max_tokens": 400, "logit_bias": {"1": -100}}).encode()
        with self._open(text) as client:
            if stream and self.draw.random() < 0.7:
                client.recv(200)
            time.sleep(self.draw.random() * 0.05)
        self.found.outcomes["left"] += 1

    def constrained(self) -> None:
        pattern = "[a-c]{2,5};"
        answer = self.http.post(f"{self.url}/v1/completions", json={"prompt": "x", "guided_regex": pattern})
        self.found.outcomes[f"constrained {answer.status_code}"] += 1
        if answer.status_code == 200 and not re.fullmatch(pattern, answer.json()["choices"][0]["text"]):
            self.found.wrong.append(f"constrained: {answer.text[:80]}")

    def malformed(self) -> None:
        content = self.draw.choice(MALFORMED)
        answer = self.http.post(
            f"{self.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        self.found.outcomes[f"malformed {answer.status_code}"] += 1
        if answer.status_code != 400 or not answer.json()["error"]["message"]:
            self.found.wrong.append(f"malformed: status {answer.status_code} for {content!r}")

    def large(self) -> None:
        try:
            answer = self.http.post(
                f"{self.url}/v1/completions", content=b'"' * (10 << 20), headers={"Content-Type": "application/json"}
            )
            self.found.outcomes[f"large {answer.status_code}"] += 1
            if answer.status_code != 413:
                self.found.wrong.append(f"large: status {answer.status_code}")
        except httpx.TransportError:  # the server closes while the client still sends
            self.found.outcomes["large, closed"] += 1

    def stall(self) -> None:
        body = json.dumps({"prompt": "x", "n": 4, "max_tokens": 400, "stream": True, "logprobs": 20}).encode()
        with self._open(body, buffer=4096):
            time.sleep(1.0)
        self.found.outcomes["stalled"] += 1

    def half_open(self) -> None:
        with socket.create_connection(self._address(), timeout=30) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Le")
            client.recv(10)  # until the server closes it
        self.found.outcomes["half open"] += 1

    def _address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rsplit(":", 1)[1])

    def _open(self, body: bytes, buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(30)
        client.connect(self._address())
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        return client


def run(artifact: Path, requests: int, clients: int = 12, seed: int = 0, kill: bool = True) -> Found:
    """Send the requests; raises AssertionError where a slot is leaked or the server does not end well."""
    found, expected = Found(), expected_texts(artifact)
    server = Process(artifact)
    halves = [requests // 4, requests - requests // 4] if kill else [requests]
    for part, count in enumerate(halves):
        _send(
            server, count, [Client(server.url, expected, found, seed + 1000 * part + n) for n in range(clients)], found
        )
        if part < len(halves) - 1:
            _kill_under_load(server, expected)
            server = Process(artifact, server.port)
    until = time.monotonic() + 30
    while (state := server.state())["slots_in_use"] or state["waiting"]:
        assert time.monotonic() < until, f"slots are leaked: {state}"
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    return found


def _send(server: Process, count: int, clients: list[Client], found: Found) -> None:
    left, lock = iter(range(count)), threading.Lock()
    found.memory.clear()

    def work(client: Client) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            client.ask()
            if number % max(1, count // 40) == 0 and number > count // 5:
                found.memory.append(server.memory())

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kill_under_load(server: Process, expected: dict[tuple[str, int, int], str]) -> None:
    clients = [Client(server.url, expected, Found(), seed) for seed in range(4)]
    threads = [threading.Thread(target=client.attempt, args=(client.leave,)) for client in clients]
    for thread in threads:
        thread.start()
    server.process.kill()
    server.process.wait(60)
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    found = run(arguments.artifact, arguments.requests, arguments.clients, arguments.seed)
    for outcome, count in sorted(found.outcomes.items()):
        print(f"{outcome}: {count}")
    print(f"{time.monotonic() - begun:.0f} s; answered wrongly: {len(found.wrong)}; memory grew by {found.growth:.1%}")
    print(*found.wrong[:20], sep="\n")
    sys.exit(bool(found.wrong) or found.growth > 0.02)


if __name__ == "__main__":
    main()
