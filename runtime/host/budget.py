"""What a load may take, and how it is stopped: by its end, by the time it was given, or by Ctrl-C."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from runtime.errors import ArtifactError, RequestError
from runtime.host.memory import available_memory

T = TypeVar("T")


class Budget:
    """Bytes of memory and seconds. `max_bytes` defaults to what the machine has free, `max_seconds` to no end."""

    def __init__(self, max_bytes: int | None = None, max_seconds: float | None = None):
        for name, value in (("max_bytes", max_bytes), ("max_seconds", max_seconds)):
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}; expected more than 0")
        self.bytes = available_memory() if max_bytes is None else max_bytes
        self.seconds, self._began = max_seconds, time.monotonic()
        self._stopped = threading.Event()

    def check_bytes(self, size: int, what: str) -> None:
        """Raise `ArtifactError` where `size` bytes are more than there may be."""
        if self.bytes is not None and size > self.bytes:
            raise ArtifactError(
                f"{what} take {size / 1e9:.2f} GB, and {self.bytes / 1e9:.2f} GB are available to this load; "
                "load it on a machine with more memory, or with a larger max_bytes"
            )

    def check(self) -> None:
        """Raise `ArtifactError` where the time is over or the work was stopped: called at every step of long work."""
        if self._stopped.is_set():
            raise ArtifactError("the load was stopped")
        if self.seconds is not None and time.monotonic() - self._began > self.seconds:
            raise ArtifactError(f"the load took more than max_seconds = {self.seconds:g}; allow it more")

    def stop(self) -> None:
        """Make every `check` from now on raise."""
        self._stopped.set()

    def run(self, work: Callable[[], T], cancel: Callable[[], None]) -> T:
        """What `work` returns, which runs in a thread of its own so that Ctrl-C and the end of the time reach this one.

        Then `cancel` is called, which may take a while to act, and this returns at once by raising.
        """
        future: Future[T] = Future()

        def fill() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=fill, name="load", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.05 if self.seconds is not None else None)
                self.check()
        except BaseException:
            cancel()
            raise
        return future.result()
