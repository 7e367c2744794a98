"""The thread that owns the engine. Requests come to it through an inbox, events leave it through callbacks."""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from runtime.errors import RequestError
from runtime.scheduling.request import Event, Request

LOG = logging.getLogger("runtime.serve")
BROKEN = "the engine failed; the server's log says where"


class Schedules(Protocol):
    """What the worker needs of `runtime.scheduling.scheduler.Scheduler`."""

    def begin(self, request: Request) -> int: ...
    def step(self) -> list[Event]: ...
    def cancel(self, sequence: int) -> object: ...
    @property
    def idle(self) -> bool: ...


class Full(Exception):
    """No room for more sequences."""


class Stopped(Exception):
    """The worker takes no more sequences."""


@dataclass(eq=False)
class Job:
    """One sequence: `deliver` gets its events in the worker's thread, the last of which has a finish reason.

    `until`: when it must have ended, by `time.monotonic`. `late`: whether it was ended since it had not.
    """

    request: Request
    deliver: Callable[[Event], None]
    until: float = float("inf")
    late: bool = False
    gone: bool = False
    number: int | None = field(default=None, init=False)


class Worker:
    """Steps a scheduler in a thread of its own while there is something to do.

    At most `most` sequences are under way or wait. Every method may be called from any thread.
    """

    def __init__(self, scheduler: Schedules | None, most: int, observe: Callable[[float], None] = lambda seconds: None):
        self.scheduler, self.most, self.observe = scheduler, most, observe
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._count, self._lock, self._open, self.failed = 0, threading.Lock(), True, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def count(self) -> int:
        """Sequences that are under way or wait."""
        return self._count

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.failed

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of the jobs or none. Raises `Full`, or `Stopped` after `close` or a failure."""
        with self._lock:
            if not self._open or self.failed:
                raise Stopped
            if self._count + len(jobs) > self.most:
                raise Full
            self._count += len(jobs)
        for job in jobs:
            self._inbox.put(lambda job=job: self._begin(job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End the jobs; those that have ended stay as they are."""
        for job in jobs:
            self._inbox.put(lambda job=job: self._cancel(job))

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Call the function between two steps. Raises `Full` or `Stopped`."""
        with self._lock:
            if not self._open or self.failed:
                raise Stopped
            if self._count >= self.most:
                raise Full
            self._count += 1
        future: Future[Any] = Future()
        self._inbox.put(lambda: self._call(function, future))
        return future

    def close(self) -> None:
        """Take no more sequences; those that are under way go on."""
        with self._lock:
            self._open = False

    def join(self, seconds: float) -> bool:
        """End the thread, and every sequence with it. Whether it has ended within `seconds`."""
        self.close()
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                if not self._take_orders():
                    break
                self._step()
            except Exception as error:
                # the message may hold what a client sent
                LOG.error(
                    "the engine failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
                )
                self.failed = True
                self._end_all(BROKEN)
        self._end_all("the server has stopped")

    def _take_orders(self) -> bool:
        """Do what the inbox asks for, and wait for it while there is nothing to step. False where it says to stop."""
        wait = self.scheduler is None or self.failed or self.scheduler.idle
        while True:
            try:
                order = self._inbox.get(block=wait)
            except Empty:
                return True
            if order is None:
                return False
            order()
            wait = False

    def _step(self) -> None:
        if self.scheduler is None or self.failed:
            return
        now = time.monotonic()
        for job in [job for job in self._jobs.values() if job.until < now and not job.late]:
            job.late = True
            self._cancel(job)
        if self.scheduler.idle:
            return
        begun = time.perf_counter()
        for event in self.scheduler.step():
            self._deliver(event)
        self.observe(time.perf_counter() - begun)

    def _begin(self, job: Job) -> None:
        assert self.scheduler is not None
        if job.gone or self.failed:
            self._finish(job, Event(-1, finish_reason="cancelled" if job.gone else "error", error=BROKEN))
            return
        try:
            job.number = self.scheduler.begin(job.request)
        except RequestError as error:
            self._finish(job, Event(-1, finish_reason="error", error=str(error)))
            return
        self._jobs[job.number] = job

    def _cancel(self, job: Job) -> None:
        job.gone = True
        if job.number in self._jobs:
            assert self.scheduler is not None
            self.scheduler.cancel(job.number)

    def _deliver(self, event: Event) -> None:
        job = self._jobs[event.sequence]
        if event.finish_reason is None:
            job.deliver(event)
        else:
            del self._jobs[event.sequence]
            self._finish(job, event)

    def _finish(self, job: Job, event: Event) -> None:
        with self._lock:
            self._count -= 1
        job.deliver(event)

    def _call(self, function: Callable[[], Any], future: "Future[Any]") -> None:
        try:
            result = function()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            with self._lock:
                self._count -= 1

    def _end_all(self, error: str) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            self._finish(job, Event(job.number or 0, finish_reason="error", error=error))
