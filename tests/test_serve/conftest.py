"""Artifacts to serve, and servers on the loopback address."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import SMALL
from test_export.conftest import save_checkpoint

from export import export_onnx
from runtime import Engine, load
from runtime.serve.app import create_app
from runtime.serve.options import ServeOptions
from runtime.serve.server import Server, bind
from test_serve.chats import CHATML
from wm_models import shipped_checkpoint


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    """The shipped model with a chat template, four slots of 512 tokens."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(shipped_checkpoint(), root / "checkpoint")
    (root / "checkpoint" / "chat_template.jinja").write_text(CHATML)
    export_onnx(root / "checkpoint", root / "doge-3m", max_batch=4, max_length=512)
    return root / "doge-3m"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A classifier with three labels, and the tokenizer of the presets."""
    root = tmp_path_factory.mktemp("classifier")
    vocabulary = {**SMALL, "vocab_size": 32768}
    save_checkpoint(root / "checkpoint", tokenizer=True, **{**vocabulary, "num_labels": 3, "pad_token_id": 2})
    export_onnx(root / "checkpoint", root / "classifier", max_length=64)
    return root / "classifier"


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
