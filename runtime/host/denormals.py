"""Numbers too small for a full mantissa, taken for zero while a graph runs.

A softmax gives every hidden key the exponential of the lowest number. Processors of the x86 family leave their fast
path for a result that small, though it ends in zero anyhow: under a causal mask of 512 by 512 ONNX Runtime's softmax
took six times as long as over the same scores without one.
"""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Floating-point environments as both C libraries of Linux on x86-64 lay them out. The last word is the register MXCSR.
Environment = ctypes.c_uint32 * 8
FLUSH = 1 << 15 | 1 << 6  # the register's bits for results and for operands
LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" and platform.machine() == "x86_64" else None


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take denormals for zero in this thread, then treat them as before. Nothing but on Linux on x86-64."""
    if LIBRARY is None:
        yield
        return
    before = Environment()
    LIBRARY.fegetenv(before)
    flushing = Environment.from_buffer_copy(before)
    flushing[-1] |= FLUSH
    LIBRARY.fesetenv(flushing)
    try:
        yield
    finally:
        LIBRARY.fesetenv(before)
