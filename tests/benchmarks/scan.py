"""The chunked scan beside a plain loop of the recurrence, forward and backward, float32: ratios from one run.

python tests/benchmarks/scan.py [TOKENS]        (default: 2048)
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from wm_models.layers.ssd import recur, scan_chunks

SIZES = {"cheems-20m": (2, 128), "cheems-160m": (6, 128)}  # heads, head size
CHUNK = 64


def loop(c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, _: int):
    """As `scan_chunks`, token by token."""
    rows = []
    for at in range(x.shape[2]):
        one = slice(at, at + 1)
        y, state = recur(c[:, :, one], b[:, :, one], x[:, :, one], log_decay[:, :, one], state)
        rows.append(y)
    return torch.cat(rows, dim=2), state


def seconds(form: Callable, heads: int, size: int, tokens: int, rounds: int) -> float:
    draw = torch.Generator().manual_seed(0)
    c, b, x = (torch.randn(1, heads, tokens, size, generator=draw).mul(0.1).requires_grad_() for _ in range(3))
    log_decay = -torch.rand(1, heads, tokens, generator=draw)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        y, state = form(c, b, x, log_decay, torch.zeros(1, heads, size, size), CHUNK)
        (y.sum() + state.sum()).backward()
        times.append(time.perf_counter() - started)
    return median(times[1:])  # the first one warms up


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    table = Table("layer of", "loop, ms", "chunks, ms", "times", title=f"{tokens} tokens, forward and backward")
    for name, (heads, size) in SIZES.items():
        slow, fast = seconds(loop, heads, size, tokens, 3), seconds(scan_chunks, heads, size, tokens, 9)
        table.add_row(name, f"{slow * 1e3:.0f}", f"{fast * 1e3:.1f}", f"{slow / fast:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
