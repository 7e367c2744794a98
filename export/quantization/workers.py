"""Threads that compute on the tensors of different weights side by side."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MOST = 4  # each takes memory for its weight


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """While the block runs, torch uses one thread in each of these workers, which are as many as it has, up to `MOST`.

    For work in many small operations: shared among threads, each would wait for the slowest at its end.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MOST)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
