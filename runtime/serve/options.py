"""What `wm-run serve` can be told."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from runtime.console import option
from runtime.errors import RequestError

PACKAGES = ("jinja2", "llguidance", "prometheus_client", "starlette", "uvicorn")  # of the extra `serve`


def missing_packages() -> list[str]:
    """The packages of the extra `serve` that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and its limits. Raises `RequestError` for values that make no server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    name: str | None = option(None, "The model's name for clients. Default: the directory's.")
    slots: int | None = option(None, "Sequences under way at once. Default: all the artifact has.")
    chunk: int = option(128, "Tokens of a prompt that are computed between two steps of the others.")
    cache: int = option(256, "MiB of memory for cache rows of earlier prompts; 0: none.")
    exact: bool = option(
        True, "Give each answer the bits of its solo run. --no-exact computes only the slots in use, which is faster "
        "for a lone request of an int8 artifact.",
    )  # fmt: skip
    queue: int = option(64, "Sequences that may wait for a slot; past it a request gets status 429.")
    deadline: float = option(600.0, "Seconds after which a request is ended with an error.")
    max_body: int = option(4 << 20, "Most bytes of a request's body.")
    max_choices: int = option(16, "Most sequences of one request: its prompts times n.")
    read_timeout: float = option(20.0, "Seconds in which a request must have arrived whole.")
    grace: float = option(60.0, "Seconds that running requests have to end after SIGTERM.")
    api_key_file: Path | None = option(None, "A file with a key that clients must send.")
    allow_origin: list[str] | None = option(None, "An origin whose web pages may call; may be repeated.")
    access_log: bool = option(False, "Log each request's path and status.")

    def __post_init__(self) -> None:
        for name in ("chunk", "max_body", "max_choices"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 1 or more")
        for name in ("queue", "cache", "grace"):
            if not getattr(self, name) >= 0:
                raise RequestError(f"--{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("deadline", "read_timeout"):
            if not getattr(self, name) > 0:
                raise RequestError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.port < 1 << 16:
            raise RequestError(f"--port is {self.port}; expected 0 to {(1 << 16) - 1}")

    def read_key(self) -> bytes | None:
        """The key that clients must send, None where none is asked for."""
        if self.api_key_file is None:
            return None
        key = self.api_key_file.read_bytes().strip()
        if not key:
            raise RequestError(f"{self.api_key_file}: is empty; expected a key")
        return key
