"""Run TensorRT's builder in a process of its own, and check the layers that it made."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.progress import SILENT, Progress


def run_builder(
    order: dict[str, Any], builder: str, modules: dict[str, str], progress: Progress = SILENT
) -> dict[str, Any]:
    """Run the builder's program on `order`, passing its progress on.

    Returns what it built, the program's last event. Raises `ExportError` where it refuses or dies.
    """
    program = Path(__file__).with_name("tensorrt_program.py")
    read, write = os.pipe()
    # -P: neither the working directory nor the program's own folder comes before the installed packages
    command = [sys.executable, "-P", str(program)]
    with open(order["log"], "w") as log, open(read) as events:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write])
        finally:
            os.close(write)
        last: dict[str, Any] = {}
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "events": write}).encode())
            process.stdin.close()
            for line in events:
                last = json.loads(line)
                if "stage" in last:
                    progress.stage(f"{builder}: {last['stage']}", last.get("total"))
                elif "done" in last:
                    progress.advance(last["done"])
        finally:
            if "built" not in last and "refused" not in last:
                process.kill()
            process.wait()
    if "built" in last:
        return last["built"]
    raise ExportError(_failure(builder, modules, last, process.returncode, Path(order["log"])))


def _failure(builder: str, modules: dict[str, str], last: dict[str, Any], code: int, log: Path) -> str:
    """Why nothing was built: the builder's words and the nodes that it names, or the last line of its log."""
    if "refused" in last:
        named = [f"{name} of {modules[name]}" for name in last["nodes"] if name in modules]
        where = f"node {', '.join(named[:3])}: " if named else ""
        return f"{builder} refuses this model: {where}{last['refused']}"
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    return f"{builder} died while building (exit code {code}); the last line of its log: {tail[0] if tail else 'none'}"


def check_layers(
    built: dict[str, Any], expected: dict[str, list[str]], caches: dict[str, str], modules: dict[str, str]
) -> None:
    """Raise `ExportError` unless every operator that matters became the layer that it should."""
    updates = built["caches"]
    found = {
        "TensorScatter": [update["name"] for update in updates],
        "Attention": [attention["name"] for attention in built["attention"]],
        "RotaryEmbedding": built["rotary"],
        "DequantizeLinear": [weight["name"] for weight in built["quantised"]],
    }
    for operator, names in expected.items():
        lost = sorted(set(names) - set(found[operator]))
        if lost or len(names) != len(found[operator]):
            name = lost[0] if lost else names[0]
            raise ExportError(
                f"TensorRT made {len(found[operator])} layers of {len(names)} {operator} nodes; "
                f"{name} of {modules[name]} has none of its own"
            )
    for update in updates:
        if caches.get(update["output"]) != update["input"]:
            raise ExportError(
                f"TensorRT's cache update {update['name']} writes {update['input']} to {update['output']}; "
                f"expected {caches.get(update['output'])}, so that it is in place"
            )
