"""Artifacts to serve, and servers on the loopback address."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from conftest import baseline, ours
from test_export.conftest import lowered

from export.package.manifest import write_manifest
from export.source import TOKENIZER_FILES
from runtime import Engine, load
from runtime.artifact.manifest import MANIFEST, parse_manifest
from runtime.serve.app import create_app
from runtime.serve.options import ServeOptions
from runtime.serve.server import Server, bind
from test_serve.chats import CHATML
from wm_models import DogeForCausalLM, shipped_checkpoint, shipped_tokenizer

VERDICT = {
    "case": "prompt 17, 64 steps",
    "positions": 65,
    "max_difference": 1.6e-05,
    "difference_limit": 0.0016,
    "mean_kl": 1.6e-12,
    "kl_limit": None,
    "argmax_agreement": 1.0,
    "argmax_flips": 0,
    "passed": True,
}


def make_artifact(directory: Path, model: Any, texts: dict[str, bytes], **bounds: int) -> Path:
    """An artifact with these files beside the graph, and a verdict that nothing was compared for."""
    lowered(directory, model, **bounds)
    verification = {"source": {}, "passed": True, "comparisons": [VERDICT]}
    for name, text in {**texts, "verification.json": json.dumps(verification).encode()}.items():
        (directory / name).write_bytes(text)
    path = directory / MANIFEST
    write_manifest(directory, parse_manifest(path.read_bytes(), path), verified=True)
    return directory


@pytest.fixture(scope="session")
def artifact(once) -> Path:
    """The shipped model with a chat template, four slots of 512 tokens."""
    return once("served", make_served) / "doge-3m"


def make_served(root: Path) -> None:
    source = shipped_checkpoint()
    texts = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).exists()}
    texts["chat_template.jinja"] = CHATML.encode()
    model = DogeForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    make_artifact(root / "doge-3m", model, texts, max_batch=4, max_length=512)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A classifier with three labels, and the tokenizer of the presets."""
    root = tmp_path_factory.mktemp("classifier")
    shipped_tokenizer().save_pretrained(root)
    model = ours(baseline(vocab_size=32768, num_labels=3, pad_token_id=2), expert_routing="token")
    texts = {"tokenizer.json": (root / "tokenizer.json").read_bytes()}
    texts["config.json"] = json.dumps(model.config.to_dict(), default=str).encode()
    return make_artifact(root / "classifier", model, texts)


class Served:
    """A server that runs in a thread of this process."""

    def __init__(self, engine: Engine, options: ServeOptions):
        self.app = create_app(engine, options)
        self.service, self.server = self.app.state.service, Server(self.app, options)
        listening = bind(options)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=120, **options)

    def settle(self, seconds: float = 60) -> None:
        """Wait until no sequence is left."""
        for _ in range(int(seconds * 100)):
            if not self.service.worker.count:
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"{self.service.worker.count} sequences are left")


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Served]:
    served = Served(engine, ServeOptions(port=0, **options))
    served.thread.start()
    try:
        for _ in range(3000):
            if served.server.started:
                break
            threading.Event().wait(0.01)
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(60)
        assert not served.thread.is_alive()


@pytest.fixture(scope="module")
def served(artifact) -> Iterator[Served]:
    """One server with its defaults, for all tests of a module."""
    with serving(load(artifact)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return served.client()


@pytest.fixture(scope="module")
def alone(artifact) -> Engine:
    """An engine beside the server's, for what it should answer."""
    return load(artifact)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
