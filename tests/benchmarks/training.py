"""Training speed and memory beside transformers' own Doge: the same weights, data and torch.compile settings.

python tests/benchmarks/training.py [LENGTH …]        (default: 512 2048)

The 20M preset in float32 on two threads, AdamW, rows of LENGTH tokens, at least 1024 tokens a step. Each side runs in a
process of its own; times are medians, and memory is the process's peak while it steps, compiling left out.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table

from wm_models import create

TOKENS, STEPS, THREADS = 1024, 7, 2


def peak_gemm() -> float:
    """What this machine's matrix product reaches, in FLOP/s."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        torch.matmul(left, right)
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def resident_peak() -> int:
    """Bytes, since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def run(side: str, length: int) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    ours = create("doge-20m")
    model = ours
    if side == "transformers":
        fields = ours.config.to_dict()
        known = transformers.DogeConfig().to_dict().keys() - {"architectures", "transformers_version"}
        config = transformers.DogeConfig(**{name: fields[name] for name in known & fields.keys()})
        model = transformers.DogeForCausalLM(config)
        model.load_state_dict(ours.state_dict())
    model.train()
    model.config.use_cache = False
    rows = max(TOKENS // length, 1)
    ids = torch.randint(3, ours.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model, fullgraph=True)
    times, losses = [], []
    for step in range(STEPS + 2):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        started = time.perf_counter()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    # every weight is in one product a token and two in the backward pass; the tied embedding as the head
    weights = sum(parameter.numel() for parameter in model.parameters())
    attention = (
        2 * length * ours.config.hidden_size * ours.config.num_hidden_layers
    )  # both products, half of them masked
    seconds = median(times[2:])
    return {
        "tokens_per_second": rows * length / seconds,
        "peak_bytes": resident_peak(),
        "share_of_gemm": 3 * (2 * weights + attention) * rows * length / seconds / peak_gemm(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(run(sys.argv[2], int(sys.argv[3]))))
        return
    columns = ("length", "tokens/s", "transformers", "times", "of GEMM peak", "peak memory", "transformers", "ratio")
    table = Table(*columns, title="doge-20m, float32, 2 threads", title_justify="left")
    for length in map(int, sys.argv[1:] or ["512", "2048"]):
        found = {}
        for side in ("wm_models", "transformers"):
            command = [sys.executable, __file__, "--side", side, str(length)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        one, other = found.values()
        assert abs(one["last_loss"] - other["last_loss"]) <= 1e-3 * other["last_loss"], found
        table.add_row(
            str(length),
            f"{one['tokens_per_second']:.0f}",
            f"{other['tokens_per_second']:.0f}",
            f"{one['tokens_per_second'] / other['tokens_per_second']:.2f}",
            f"{one['share_of_gemm']:.0%}",
            f"{one['peak_bytes'] / 1e9:.2f} GB",
            f"{other['peak_bytes'] / 1e9:.2f} GB",
            f"{one['peak_bytes'] / other['peak_bytes']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
