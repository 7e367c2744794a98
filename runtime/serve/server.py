"""Run the application with uvicorn: connections that stall are closed, SIGTERM lets running requests end."""

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.errors import RequestError
from runtime.serve.options import ServeOptions

LARGEST_HEAD = 64 << 10  # bytes of a request's first line and headers


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol that closes a connection whose request, or whose reading of the answer, stalls."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect(True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            state = self.conn.their_state
            self._expect(state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0])))

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect(True)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._expect(False)

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect(False)
            super().connection_lost(exc)

        def _expect(self, something: bool) -> None:
            """Wait for the client, or not any more. A wait that has begun goes on."""
            if not something and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            elif something and self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.abort)

    return TimedProtocol


class Server(uvicorn.Server):
    """uvicorn's server. After the first signal it answers 503 to new requests until the running ones have ended."""

    def __init__(self, app: Starlette, options: ServeOptions):
        self.service = app.state.service
        self.asked = 0  # the last signal
        self._ending: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=timed_protocol(options.read_timeout),
                ws="none",
                loop="asyncio",
                log_level="info" if options.access_log else "warning",
                access_log=options.access_log,
                server_header=False,
                h11_max_incomplete_event_size=LARGEST_HEAD,
                timeout_graceful_shutdown=5,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.asked:
            self.should_exit = True
        self.asked = sig

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self.asked and self._ending is None:
            self.service.drain()
            self._ending = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        deadline = self.service.options.grace
        while self.service.worker.count and deadline > 0:
            await asyncio.sleep(0.05)
            deadline -= 0.05
        self.should_exit = True


def bind(options: ServeOptions) -> socket.socket:
    """A socket that listens. Raises `RequestError` where the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], options.port), family=family, backlog=1024)
    except OSError as error:
        raise RequestError(f"cannot listen on {options.host}:{options.port}: {error}") from error


def serve(app: Starlette, options: ServeOptions, listening: socket.socket) -> None:
    """Serve until a signal ends it. Raises KeyboardInterrupt after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server = Server(app, options)
    server.run(sockets=[listening])
    if server.asked == signal.SIGINT:
        raise KeyboardInterrupt
