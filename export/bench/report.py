"""What a bench measured, for a person: a table, and a picture of tokens/s over context length."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from runtime.errors import RequestError


def render(result: dict[str, Any], as_json: bool) -> None:
    """Print what `bench.measure` returned."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    title = (
        f"{result['artifact']}: {result['dtype']}, quantization {result['quantization']}, batch 1, "
        f"prompt {result['prompt_length']}, "
        f"{result['new_tokens']} new tokens, median of {result['rounds']}"
    )
    table = Table("measure", "value", title=title, title_justify="left")
    table.add_row("load", f"{result['load_seconds']:.2f} s")
    if "first_token_seconds" in result:
        table.add_row("load and first token after a prompt of 16", f"{result['first_token_seconds']:.2f} s")
    table.add_row("prefill", f"{result['prefill_tokens_per_second']:.0f} tokens/s")
    table.add_row("decode", f"{result['decode_tokens_per_second']:.1f} tokens/s")
    table.add_row("generate, whole", f"{result['generate_tokens_per_second']:.1f} tokens/s")
    if "batch" in result:
        table.add_row(f"decode, batch {result['batch']}", f"{result['batch_tokens_per_second']:.1f} tokens/s")
        table.add_row("times batch 1", f"{result['batch_over_one']:.2f}")
    if "batch_floor_over_one" in result:
        table.add_row("the floor's, likewise", f"{result['batch_floor_over_one']:.2f}")
    table.add_row("weights", f"{result['weights_bytes'] / 1e6:.0f} MB")
    if "share_of_floor" in result:
        table.add_row("floor: linear layers alone", f"{result['floor_steps_per_second']:.1f} steps/s")
        table.add_row("decode as a share of the floor", f"{result['share_of_floor']:.0%}")
        table.add_row("prefill as a share of its floor", f"{result['prefill_share_of_floor']:.0%}")
        table.add_row("large float32 product", f"{result['product_flops'] / 1e9:.0f} GFLOP/s")
        table.add_row("prefill, work of its linear layers, of that rate", f"{result['prefill_share_of_product']:.0%}")
        table.add_row("peak memory of a process", f"{result['peak_bytes'] / 1e6:.0f} MB")
        table.add_row("peak memory / weights", f"{result['peak_over_weights']:.2f}")
    for name, rival in result["rivals"].items():
        if "failed" in rival:
            table.add_row(name, rival["failed"])
            continue
        table.add_row(f"{name}, whole generate", f"{rival['generate_tokens_per_second']:.1f} tokens/s")
        table.add_row(f"{name}, decode", f"{rival['decode_tokens_per_second']:.1f} tokens/s")
        table.add_row(f"times as fast as {name}", f"{rival['times_as_fast']:.2f}")
        if "floor_times_as_fast" in rival:
            table.add_row(f"the floor is times as fast as {name}", f"{rival['floor_times_as_fast']:.2f}")
    Console().print(table)


def check_plot(path: Path) -> None:
    """Raise `RequestError` where no picture could be drawn at `path`, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("--plot needs matplotlib; install it, for example with pip install matplotlib") from None
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise RequestError(f"--plot is {path}; expected a .png, .svg or .pdf file in a directory that exists")


def plot(result: dict[str, Any], path: Path) -> None:
    """Decode tokens/s over context length: the engine, its rivals, and what memory bandwidth allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    measured = {Path(result["artifact"]).name: result["contexts"]}
    measured |= {name: rival["contexts"] for name, rival in result["rivals"].items() if "failed" not in rival}
    for name, rates in measured.items():
        axes.plot([int(context) for context in rates], list(rates.values()), marker="o", label=name)
    if "bandwidth" in result:
        limits = result["bandwidth_limits"]
        label = f"memory bandwidth, {result['bandwidth'] / 1e9:.0f} GB/s"
        axes.plot([int(context) for context in limits], list(limits.values()), "k--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="decode, tokens/s")
    axes.set_xticks([int(context) for context in result["contexts"]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter("")
    low, high = axes.get_ylim()
    ticks = [digit * 10**power for power in range(-2, 6) for digit in (1, 1.5, 2, 3, 4, 5, 7)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    threads = f"{result['threads']} threads" if result["threads"] else "its physical cores"
    where = f"{result['device']}, {threads}" if result["device"] == "CPU" else result["device"]
    axes.set_title(f"{result['dtype']}, quantization {result['quantization']}, batch 1, {where}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
