"""What Prometheus is told at `/metrics`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("wm_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.cancelled = Counter("wm_cancelled", "Sequences whose client left.", registry=registry)
        self.tokens_in = Counter("wm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens_reused = Counter("wm_reused_tokens", "Prompt tokens not computed again.", registry=registry)
        self.cache_hits = Counter("wm_cache_hits", "Sequences that began with rows of an earlier.", registry=registry)
        self.tokens_out = Counter("wm_new_tokens", "Tokens that were generated.", registry=registry)
        self.first_token = Histogram(
            "wm_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.next_token = Histogram(
            "wm_next_token_seconds", "Between two tokens of a sequence.", buckets=SECONDS, registry=registry
        )
        self.step = Histogram("wm_step_seconds", "One step of the engine.", buckets=SECONDS, registry=registry)

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A figure that is read when it is asked for."""
        Gauge(name, help, registry=self.registry).set_function(read)
