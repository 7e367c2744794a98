"""Foreign code, run in a child process with bounded time and memory."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

SECONDS = 5.0  # of CPU time for one job
PATIENCE = 60.0  # seconds to wait for the child beyond that: a busy machine delays it
CHILD = Path(__file__).with_name("child.py")


class Sandbox:
    """A child process that does one kind of job. It starts with the first job, and ends when one takes too long.

    `job` is a module beside this file; `what` begins the messages; `seconds` of CPU time are what one job may take.
    Threads share it: they wait for one another.
    """

    def __init__(self, job: str, what: str, seconds: float = SECONDS):
        self.job, self.what, self.seconds = job, what, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, **arguments: Any) -> str:
        """The job's answer. Raises `RequestError` where it fails, takes too long or too much memory.

        Raises TypeError for arguments that JSON cannot hold.
        """
        order = json.dumps({"seconds": self.seconds, "arguments": arguments}).encode() + b"\n"
        with self._lock:
            try:
                answer = json.loads(self._exchange(order))
            except OSError as error:
                self.close()
                raise RequestError(f"{self.what} has no process to run in: {error}") from error
            except EOFError as error:
                assert self._process is not None
                late = self._process.wait() == -signal.SIGPROF
                self.close()
                why = f"takes more than {self.seconds:g} s" if late else "takes too much memory, or ended its process"
                raise RequestError(f"{self.what} {why}") from error
        if "error" in answer:
            raise RequestError(f"{self.what} fails: {' '.join(answer['error'].split())}")
        return answer["text"]

    def close(self) -> None:
        """End the child process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, order: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
            _line(self._process, PATIENCE)
        entry = self._process.stdin
        assert entry is not None
        left = memoryview(order)
        while left:
            left = left[entry.write(left) :]
        return _line(self._process, self.seconds + PATIENCE)

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-I", str(CHILD), self.job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )


def _line(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """The next line that the process writes. Raises TimeoutError, or EOFError where it ends first."""
    answers, until = process.stdout, time.monotonic() + seconds
    assert answers is not None
    parts: list[bytes] = []
    while not (parts and parts[-1].endswith(b"\n")):
        if not select.select([answers], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError(f"no answer after {seconds:g} s")
        part = os.read(answers.fileno(), 1 << 16)
        if not part:
            raise EOFError
        parts.append(part)
    return b"".join(parts)
