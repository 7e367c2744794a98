"""Forward and backward of a small Doge past its keep window, by sequence length: CPU seconds and peak memory.

python tests/benchmarks/selection.py [--lengths 1024 2048 4096 8192 16384] [--compile] [--transformers 4096]

Hidden size 256, 4 layers, 4/2 heads, keep window w = 512, float32, one sequence, one thread. `selection` is Doge,
`every key` the same model with w = S, `transformers` its own Doge with w = 512 up to the length given, which makes the
mask of every head and layer. `no attention` is the rest of the model: its projections' results are added and not
attended with. Each measurement is a process of its own: the fastest of three passes, and the peak
of resident memory over that before the passes.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from wm_models import DogeConfig, DogeForCausalLM, decoder
from wm_models.context import CacheContext

KEEP, PASSES = 512, 3
SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def resident(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class AddingContext(CacheContext):
    """Sums in the place of attention, so that every projection has a gradient."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        total = key + value * bias.unflatten(1, (key.shape[1], -1)).sum(2)[..., None]
        return query + total.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def run(kind: str, length: int, compiled: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": length, "keep_window_size": length if kind == "every key" else KEEP}
    if kind == "transformers":
        model = transformers.DogeForCausalLM(transformers.DogeConfig(**sizes))
    else:
        model = DogeForCausalLM(DogeConfig(**sizes))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.A)  # with A = 0 all biases are equal
    if kind == "no attention":
        decoder.CacheContext = AddingContext
    model.train()
    model.config.use_cache = False
    forward = torch.compile(model, fullgraph=True) if compiled else model
    ids = torch.randint(3, SIZES["vocab_size"], (1, length))
    if compiled:
        forward(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the base has what the passes before it freed
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds = []
    for _ in range(PASSES):
        started = time.process_time()
        forward(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.process_time() - started)
        model.zero_grad()
    return {"seconds": min(seconds), "bytes": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--transformers", type=int, default=4096, help="the longest sequence that transformers gets")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(run(given.run[0], int(given.run[1]), given.compile)))
        return
    kinds = ("selection", "every key", "no attention", "transformers")
    table = Table("S", *(f"{kind}, {unit}" for kind in kinds for unit in ("s", "µs a token", "MB")))
    for length in given.lengths:
        cells = []
        for kind in kinds:
            if kind == "transformers" and length > given.transformers:
                cells += ["", "", ""]
                continue
            command = [sys.executable, __file__, "--run", kind, str(length), *["--compile"] * given.compile]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = found["seconds"]
            cells += [f"{seconds:.2f}", f"{seconds / length * 1e6:.0f}", f"{found['bytes'] / 1e6:.0f}"]
        table.add_row(str(length), *cells)
        print(length, *cells, flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
