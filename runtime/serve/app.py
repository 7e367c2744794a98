"""The HTTP application: its paths, and what each answers."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from runtime.engine import Engine
from runtime.serve.answers import ChatAnswer, CompletionAnswer
from runtime.serve.calls import parse_chat, parse_completion, parse_messages
from runtime.serve.errors import ApiError
from runtime.serve.fields import Fields, refuse
from runtime.serve.guard import Guard, answer_error, read_object
from runtime.serve.options import ServeOptions
from runtime.serve.service import Service
from runtime.serve.streams import respond, until_gone
from runtime.text.labels import label_scores
from runtime.text.tokenizer import decode

PAGE = Path(__file__).with_name("page.html")
Handler = Callable[[Service, Request], Awaitable[Response]]


def create_app(engine: Engine, options: ServeOptions | None = None) -> Starlette:
    """An ASGI application that serves the engine, which it owns from its start to its end.

    `app.state.service` is its `Service`. Raises `RequestError` for options that the artifact cannot meet.
    """
    service = Service(engine, options or ServeOptions())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    handlers: list[tuple[str, str, Handler]] = [
        ("GET", "/", _page),
        ("GET", "/health", _health),
        ("GET", "/ready", _ready),
        ("GET", "/metrics", _metrics),
        ("GET", "/state", _state),
        ("GET", "/artifact", _artifact),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:path}", _model),
        ("POST", "/v1/completions", _completions),
        ("POST", "/v1/chat/completions", _chat),
        ("POST", "/v1/embeddings", _embeddings),
        ("POST", "/v1/classify", _classify),
        ("POST", "/tokenize", _tokenize),
        ("POST", "/detokenize", _detokenize),
    ]
    middleware = [Middleware(Guard, service=service)]
    if service.options.allow_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=service.options.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[Route(path, partial(handler, service), methods=[method]) for method, path, handler in handlers],
        middleware=middleware,
        exception_handlers={404: answer_error, 405: answer_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _page(service: Service, request: Request) -> Response:
    policy = (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    )
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})


async def _health(service: Service, request: Request) -> Response:
    alive = service.worker.alive
    return JSONResponse({"status": "alive" if alive else "failed"}, 200 if alive else 503)


async def _ready(service: Service, request: Request) -> Response:
    ready = service.worker.alive and not service.stopping
    return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(generate_latest(service.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _state(service: Service, request: Request) -> Response:
    return JSONResponse(service.state())


async def _artifact(service: Service, request: Request) -> Response:
    """What the page's table shows."""
    artifact = service.engine.artifact
    graph = artifact.graph
    return JSONResponse(
        {
            "name": service.name,
            "model_type": artifact.model_type,
            "parameters": artifact.parameters,
            "dtype": graph.dtype,
            "quantization": json.loads(artifact.manifest)["graph"].get("quantization", "none"),
            "max_length": graph.max_length,
            "max_batch": graph.max_batch,
            "vocabulary": graph.vocabulary,
            "labels": list(service.engine.labels),
            "chat": service.chats,
            "text": service.engine.tokenizer is not None,
            "verified": artifact.verified,
            "verification": artifact.read_json("verification.json"),
        }
    )


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def _model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return JSONResponse(_described(service))


def _described(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "wm-models",
        "max_model_len": service.engine.graph.max_length,
    }


async def _completions(service: Service, request: Request) -> Response:
    made = parse_completion(await read_object(service, request), service.options.max_choices)
    call = made.call
    service.check_task(classifies=False)
    service.check_model(call.model)
    ids = [await service.apart(service.encode, prompt) for prompt in made.prompts]
    requests = await service.apart(service.requests, call, ids, made.echo and call.logprobs is not None)
    tokenizer = service.engine.tokenizer
    echoes = None
    if made.echo:
        echoes = await service.apart(service.echoes, made.prompts)
    answer = CompletionAnswer(service.name, tokenizer, call.logprobs, echoes, ids)
    return await respond(service, request.receive, call, requests, answer)


async def _chat(service: Service, request: Request) -> Response:
    made = parse_chat(await read_object(service, request), service.options.max_choices)
    service.check_task(classifies=False)
    service.check_model(made.call.model)
    ids = await service.apart(service.encode_chat, made.messages, made.variables)
    requests = await service.apart(service.requests, made.call, [ids])
    answer = ChatAnswer(service.name, service.engine.tokenizer, made.call.logprobs)
    return await respond(service, request.receive, made.call, requests, answer)


async def _embeddings(service: Service, request: Request) -> Response:
    raise ApiError(
        400, "/v1/embeddings is not supported: a graph of this package has no outputs that are embeddings",
        code="unsupported_endpoint",
    )  # fmt: skip


async def _classify(service: Service, request: Request) -> Response:
    fields = Fields(await read_object(service, request))
    service.check_task(classifies=True)
    service.check_model(fields.text("model"))
    given = fields.take("input")
    fields.end()
    rows = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    for row in rows:
        is_ids = isinstance(row, list) and bool(row) and all(type(token) is int for token in row)
        if not isinstance(row, str) and not is_ids:
            refuse("input", given, "a text, token ids, or a list of either")
    if len(rows) > service.options.max_choices:
        raise ApiError(400, f"input has {len(rows)} texts; expected up to {service.options.max_choices}", "input")
    ids = [await service.apart(service.encode, row) for row in rows]
    logits: np.ndarray = await until_gone(request.receive, service.call(lambda: service.engine.classify(ids)))
    scores = label_scores(service.engine.artifact, logits)
    tokens = sum(map(len, ids))
    service.metrics.tokens_in.inc(tokens)
    labels = service.engine.labels
    data = [
        {"index": index, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)}
        for index, row in enumerate(scores)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": service.name, "data": data, "usage": usage})


async def _tokenize(service: Service, request: Request) -> Response:
    fields = Fields(await read_object(service, request))
    service.check_model(fields.text("model"))
    messages, prompt = fields.take("messages"), fields.text("prompt")
    fields.end()
    if (messages is None) == (prompt is None):
        raise ApiError(400, "expected either prompt or messages", "prompt")
    if prompt is None:
        ids = await service.apart(service.encode_chat, parse_messages(messages))
    else:
        ids = await service.apart(service.encode, prompt)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.engine.graph.max_length})


async def _detokenize(service: Service, request: Request) -> Response:
    fields = Fields(await read_object(service, request))
    service.check_model(fields.text("model"))
    tokens, vocabulary = fields.take("tokens"), service.engine.graph.vocabulary
    fields.end()
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        refuse("tokens", tokens, f"a list of token ids from 0 to {vocabulary - 1}")
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise ApiError(400, f"{service.name}: has no tokenizer")
    return JSONResponse({"prompt": await service.apart(partial(decode, tokenizer, tokens, special=True))})
