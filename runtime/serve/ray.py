"""The server on Ray Serve: `serve run runtime.serve.ray:application artifact=DIR replicas=2`.

A replica is a process with an engine and the application of `runtime.serve.app`. Ray's proxy gives each request to one
of them. Requests that are under way in a replica that dies are answered with status 500, which the OpenAI client sends
again by itself; the others go to the replicas that are left, and Ray starts a new one.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.applications import Starlette

from runtime.artifact.integrity import open_artifact
from runtime.backends.registry import AUTO
from runtime.engine import load
from runtime.errors import RequestError
from runtime.serve.app import create_app
from runtime.serve.options import ServeOptions

OF_THE_PROXY = ("host", "port", "read_timeout", "access_log")  # which Ray's proxy decides, by `serve start` or a file


@dataclass(frozen=True)
class RayOptions:
    """An artifact, and how many replicas of it there are.

    `replicas`: that run always. `max_replicas`: that run at the most; their number follows the requests that are under
    way or wait, of which a replica is to have as many as it has slots. `cpus`, `gpus`: what Ray reserves for a replica;
    its engine computes with so many threads.
    """

    artifact: Path
    replicas: int = 1
    max_replicas: int | None = None
    cpus: int = 1
    gpus: float = 0
    backend: str = AUTO

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("cpus", 1), ("gpus", 0), ("max_replicas", self.replicas)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}; expected {least} or more")


class Replica:
    """One engine and its application, in a process that Ray starts."""

    def __init__(self, options: RayOptions, limits: ServeOptions):
        engine = load(options.artifact, options.backend, threads=options.cpus)
        self._application = create_app(engine, limits)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._application

    def check_health(self) -> None:
        """Raise RuntimeError once the engine has failed, at which Ray starts another replica."""
        if not self._application.state.service.worker.alive:
            raise RuntimeError("the engine failed; the replica's log says where")


def application(arguments: dict[str, Any]) -> Application:
    """What `serve run` and Ray's configuration files deploy.

    `arguments`: the fields of `RayOptions` and of `ServeOptions`, as values or as texts. Raises `RequestError` for
    others, and `ArtifactError` for an artifact that cannot be opened.
    """
    send_no_usage()
    options, limits = parse(arguments)
    with open_artifact(options.artifact) as artifact:
        slots = limits.slots or artifact.graph.max_batch
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                target_ongoing_requests=slots,
            )
        }
    deploy = serve.deployment(
        name=limits.name or options.artifact.resolve().name,
        max_ongoing_requests=slots + limits.queue,
        max_queued_requests=max(1, limits.queue),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=limits.grace,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **scaling,
    )
    return deploy(serve.ingress()(Replica)).bind(options, limits)


def parse(arguments: dict[str, Any]) -> tuple[RayOptions, ServeOptions]:
    """The two groups of options. Raises `RequestError`."""
    own, theirs = ({each.name for each in fields(kind)} for kind in (RayOptions, ServeOptions))
    for name in arguments:
        if name in OF_THE_PROXY:
            raise RequestError(f"{name} is an option of Ray's proxy; give it to serve start or in a configuration file")
        if name not in own | theirs:
            known = sorted((own | theirs) - set(OF_THE_PROXY))
            raise RequestError(f"{name} is no option; expected one of {', '.join(known)}")
    try:
        options = TypeAdapter(RayOptions).validate_python({name: arguments[name] for name in own & set(arguments)})
        limits = TypeAdapter(ServeOptions).validate_python({name: arguments[name] for name in theirs & set(arguments)})
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return options, limits


def send_no_usage() -> None:
    """Have a Ray that this process starts send its makers nothing, unless the environment says otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
