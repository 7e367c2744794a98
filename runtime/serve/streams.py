"""From the engine's events to HTTP answers, and the end of a request whose client has left."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from runtime.scheduling.request import Event, Request
from runtime.serve.answers import DONE, Answer, Choice, frame
from runtime.serve.calls import Call
from runtime.serve.errors import ApiError, too_late
from runtime.serve.service import Service

T = TypeVar("T")


class Sequences:
    """The sequences of one request. Events come in the order of the engine's steps. Raises `ApiError`."""

    def __init__(self, service: Service, requests: Sequence[Request], choices: int, deadline: float | None):
        self.service, self.begun, self.last = service, time.perf_counter(), {}
        self.choices = [Choice(index, index // choices) for index in range(len(requests))]
        self.deadline = min(deadline or float("inf"), service.options.deadline)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop, self._left = asyncio.get_running_loop(), len(requests)
        self._jobs = service.submit(requests, self._deliver, deadline)

    async def events(self) -> AsyncIterator[tuple[Choice, Event]]:
        """Each event with its choice, which has taken it."""
        while self._left:
            index, event = await self._events.get()
            self._left -= event.finish_reason is not None
            if event.finish_reason == "cancelled":
                raise too_late(self.deadline)
            if event.finish_reason == "error":
                raise ApiError(400 if event.sequence < 0 else 500, event.error or "the engine failed")
            choice = self.choices[index]
            choice.take(event)
            self._measure(choice, event)
            yield choice, event

    def cancel(self) -> None:
        """End what has not ended."""
        if self._left:
            self.service.metrics.cancelled.inc(self._left)
            self.service.worker.cancel(self._jobs)

    def _deliver(self, index: int, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _measure(self, choice: Choice, event: Event) -> None:
        metrics, now = self.service.metrics, time.perf_counter()
        if event.token is not None:
            before = self.last.get(choice.index)
            (metrics.first_token if before is None else metrics.next_token).observe(now - (before or self.begun))
            self.last[choice.index] = now
            metrics.tokens_out.inc()
        if event.finish_reason is not None:
            metrics.tokens_in.inc(event.prompt_tokens)
            metrics.tokens_reused.inc(event.reused_tokens)
            metrics.cache_hits.inc(event.reused_tokens > 0)


async def respond(
    service: Service, receive: Receive, call: Call, requests: Sequence[Request], answer: Answer
) -> Response:
    """The answer to a request. Raises `ApiError`, or ClientDisconnect where the client leaves before it."""
    sequences = Sequences(service, requests, call.choices, call.deadline)
    if not call.stream:
        return JSONResponse(await _whole(sequences, receive, answer))
    pieces = _pieces(sequences, answer, call.stream_usage)
    try:
        first = await until_gone(receive, anext(pieces))
    except BaseException:
        sequences.cancel()
        raise
    return EventStream(sequences, first, pieces)


async def _whole(sequences: Sequences, receive: Receive, answer: Answer) -> dict[str, Any]:
    async def collect() -> None:
        async for _ in sequences.events():
            pass

    try:
        await until_gone(receive, collect())
    finally:
        sequences.cancel()
    return answer.whole(sequences.choices)


async def _pieces(sequences: Sequences, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    async for choice, event in sequences.events():
        parts = [] if choice.index in begun else answer.begin(choice)
        begun.add(choice.index)
        yield b"".join(map(frame, [*parts, answer.piece(choice, event)]))
    if with_usage:
        yield frame(answer.last(sequences.choices))
    yield DONE


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result; ClientDisconnect, and the work's end, where the client leaves before it is done."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. An error after the first of them is an event too."""

    media_type = "text/event-stream"

    def __init__(self, sequences: Sequences, first: bytes, rest: AsyncIterator[bytes]):
        self.sequences, self.first, self.rest = sequences, first, rest
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self.sequences.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.first, "more_body": True})
        try:
            async for piece in self.rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": frame(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
