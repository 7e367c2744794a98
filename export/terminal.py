"""Progress for a person: a bar with the time left on a terminal, a line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from export.progress import Progress
from export.verification.comparison import Comparison
from runtime import console


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """While the block runs, stages are shown on stderr, and comparisons on stdout."""
    shown = _BarProgress() if sys.stderr.isatty() else _LineProgress()
    try:
        yield shown
    finally:
        shown.close()


class _BarProgress(Progress):
    """A bar for the current stage, with the time left where its total is known."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True, highlight=False), transient=True, redirect_stdout=False)
        self._bar.start()
        self._task = self._bar.add_task("starting", total=None)

    def stage(self, name: str, total: int | None = None) -> None:
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total)

    def advance(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)

    def report(self, comparison: Comparison) -> None:
        if sys.stdout.isatty():  # above the bar
            self._bar.console.print(describe_comparison(comparison), soft_wrap=True, markup=False)
        else:
            print(describe_comparison(comparison))

    def close(self) -> None:
        self._bar.stop()


class _LineProgress(Progress):
    """The current stage and how much of it is done, every few seconds; nothing for what is done sooner."""

    def __init__(self) -> None:
        self._name, self._done, self._total = "starting", 0, None
        self._began, self._closed = time.monotonic(), threading.Event()
        threading.Thread(target=self._print, daemon=True).start()

    def stage(self, name: str, total: int | None = None) -> None:
        self._name, self._done, self._total, self._began = name, 0, total, time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count

    def report(self, comparison: Comparison) -> None:
        print(describe_comparison(comparison), flush=True)

    def close(self) -> None:
        self._closed.set()

    def _print(self) -> None:
        while not self._closed.wait(console.INTERVAL):
            line = console.progress_line(self._name, time.monotonic() - self._began, self._done, self._total)
            print(line, file=sys.stderr, flush=True)


def describe_comparison(comparison: Comparison) -> str:
    """One line: passed or not, and each figure with its limit."""
    limit = f" (limit {comparison.difference_limit:.1e})" if comparison.difference_limit is not None else ""
    kl_limit = f" (limit {comparison.kl_limit:.0e})" if comparison.kl_limit is not None else ""
    return (
        f"{'ok  ' if comparison.passed else 'FAIL'} {comparison.case}: max |Δlogit| "
        f"{comparison.max_difference:.1e}{limit}, mean KL {comparison.mean_kl:.1e}{kl_limit}, "
        f"argmax agreement {comparison.argmax_agreement:.2%}"
    )
