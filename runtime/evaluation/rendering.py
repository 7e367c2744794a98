"""What was measured of a model on texts, for a person: tables, and a histogram."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.evaluation.perplexity import PerplexityOptions, Quality

SMALLEST = 1e-12  # nats; a divergence below it is drawn as this
BINS = 60


def show(quality: Quality, options: PerplexityOptions) -> None:
    """Print what was measured as tables, or as JSON, and draw the picture that is asked for."""
    if options.as_json:
        print(json.dumps(quality.figures, indent=2))
    else:
        console = Console()
        for table in tables(quality.figures):
            console.print(table)
    if options.plot is not None and quality.divergences is not None:
        plot(quality.divergences, quality.figures, options.plot)


def tables(figures: dict[str, Any]) -> list[Table]:
    """The measures; where another model was compared, its own beside them, and the worst positions."""
    other = figures.get("against")
    title = (
        f"{figures['artifact']}: {figures['dtype']}, quantization {figures['quantization']}, "
        f"{figures['bytes']:,} bytes, {figures['tokens']:,} tokens, "
        f"context {figures['length']}, stride {figures['stride']}"
    )
    names = ["measure", "value"] if other is None else ["measure", "value", other["name"]]
    table = Table(*names, title=title, title_justify="left")
    for name, key, form in (
        ("bits/byte", "bits_per_byte", ".5f"),
        ("perplexity", "perplexity", ".4f"),
        ("tokens/s", "tokens_per_second", ".0f"),
    ):
        table.add_row(name, *(format(each[key], form) for each in (figures, other) if each is not None))
    if other is None:
        return [table]
    for name, key in (
        ("KL, mean, nats", "mean_kl"),
        ("KL, 99th percentile", "kl_99th_percentile"),
        ("KL, maximum", "max_kl"),
    ):
        table.add_row(name, f"{other[key]:.3e}")
    table.add_row("argmax agreement", f"{other['argmax_agreement']:.3%}")
    return [table, _worst_table(other["worst"], other["name"])] if other["worst"] else [table]


def _worst_table(worst: Sequence[dict[str, Any]], name: str) -> Table:
    """Where the divergence is largest; texts are shown with escapes, as they may hold anything."""
    table = Table(
        "KL", "file: token", "context", "next", "argmax", f"argmax of {Path(name).name}",
        title="Where the two differ most", title_justify="left",
    )  # fmt: skip
    for each in worst:
        cells = [
            f"{each['kl']:.2e}", f"{Path(each['file']).name}: {each['position']}", repr(each["context"])[-42:-1],
            repr(each["token"]), *(f"{made['token']!r} {made['probability']:.2f}" for made in
                                   (each["argmax"], each["other_argmax"])),
        ]  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def plot(divergences: np.ndarray, figures: dict[str, Any], path: Path) -> None:
    """Draw how many positions have which KL divergence, on logarithmic scales, with the mean and the percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    other = figures["against"]
    values = np.maximum(divergences, SMALLEST)
    low, high = np.log10(values.min()), np.log10(values.max())
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.hist(values, bins=np.logspace(low - 0.1, high + 0.1, BINS).tolist(), color="#4477aa")
    for key, label, style in (("mean_kl", "mean", "-"), ("kl_99th_percentile", "99th percentile", "--")):
        if other[key] > 0:
            axes.axvline(other[key], color="#bb3333", linestyle=style, label=f"{label}, {other[key]:.2e}")
    axes.set(xscale="log", yscale="log", xlabel="KL divergence, nats", ylabel="positions")
    names = f"{Path(figures['artifact']).name} against {Path(other['name']).name}"
    axes.set_title(
        f"{names}: {divergences.size:,} positions, argmax agreement {other['argmax_agreement']:.2%}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
