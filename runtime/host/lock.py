"""Who may use an engine: one thread at a time, of the process that loaded it."""

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from runtime.errors import RequestError

P = ParamSpec("P")
R = TypeVar("R")


class Exclusive:
    """A lock that turns the second thread away at once, and every process but the one that made it.

    A fork has the memory of the engine, but none of the threads that compute for it: it would wait for ever.
    """

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise RequestError(
                f"this engine was loaded by process {self._process}, and process {os.getpid()} is a fork of it; "
                "load the artifact in the new process"
            )
        if not self._lock.acquire(blocking=False):
            raise RequestError("this engine is at work for another thread; load one for each, or let them wait")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def exclusive(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of an object whose `in_use` is an `Exclusive`, held while the method runs."""

    @wraps(method)
    def held(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.in_use:
            return method(self, *args, **kwargs)

    return held
