"""What stands before every path: the key, the body's bounds, and the form of every error."""

import hmac
import logging
import traceback
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.serve.errors import ApiError, stopping
from runtime.serve.fields import parse_body
from runtime.serve.service import Service

LOG = logging.getLogger("runtime.serve")
OPEN = frozenset({"/", "/health", "/ready"})  # paths that need no key: the page asks for one itself


class Guard:
    """Checks the key, counts requests, and makes every error one of the API's. Logs nothing of a request."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            if scope["method"] == "POST" and self.service.stopping:
                raise stopping()
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            if status:
                raise
            await _as_response(error)(scope, receive, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.service.metrics.requests.labels(path, str(status)).inc()

    def _check_key(self, scope: Scope) -> None:
        key = self.service.key
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where the application is mounted
        if key is None or path in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + key):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )


def _as_response(error: Exception) -> Response:
    if not isinstance(error, ApiError):
        # the message may hold what a client sent
        LOG.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        error = ApiError(500, "the server failed; its log says where")
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer for a path or a method that there is none of."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see /v1/models for a path that there is"
    return _as_response(ApiError(error.status_code, message, code="unknown_url"))


async def read_object(service: Service, request: Request) -> dict[str, Any]:
    """The JSON object of a body. Raises `ApiError` for one that is too large or none.

    A page of another origin can send other types of content without asking this server first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:60] or 'missing'}; expected application/json")
    most, parts, size = service.options.max_body, [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        parts.append(part)
    return parse_body(b"".join(parts))
