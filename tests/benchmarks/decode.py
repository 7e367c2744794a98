"""Decode speed of the dense presets beside their floor and baselines: one table, ratios from one run.

python tests/benchmarks/decode.py [PRESET …]        (default: doge-20m doge-60m doge-160m)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

BASELINES = ("transformers", "mobius-onnx")
COLUMNS = (
    "preset", "tokens/s", *(column for name in BASELINES for column in (name, "times")),
    "decode steps/s", "floor", "share", "peak / weights",
)  # fmt: skip


def measure(preset: str, root: Path) -> list[str]:
    """Export the preset and bench it, each in a process of its own; one row of the table."""
    artifact = str(root / preset)
    commands = Path(sys.executable).parent
    subprocess.run([commands / "wm-export", "onnx", preset, "--out", artifact], check=True)
    against = [option for name in BASELINES for option in ("--against", name)]
    options = [*against, "--threads", "2", "--json"]
    command = [commands / "wm-export", "bench", artifact, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    cells = [f"{result['generate_tokens_per_second']:.1f}"]
    for name in BASELINES:
        baseline = result["baselines"][name]
        rate, times = baseline.get("generate_tokens_per_second"), baseline.get("times_as_fast")
        cells += ["-", "-"] if rate is None else [f"{rate:.1f}", f"{times:.2f}"]
    rates = (result["decode_tokens_per_second"], result["floor_steps_per_second"])
    shares = (result["share_of_floor"], result["peak_over_weights"])
    return [preset, *cells, *(f"{rate:.1f}" for rate in rates), *(f"{share:.2f}" for share in shares)]


def main() -> None:
    table = Table(*COLUMNS, title="float32, batch 1, prompt 128, 128 new tokens, 2 threads", title_justify="left")
    with tempfile.TemporaryDirectory() as root:
        for preset in sys.argv[1:] or ["doge-20m", "doge-60m", "doge-160m"]:
            table.add_row(*measure(preset, Path(root)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
