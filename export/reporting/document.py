"""report.html: what an artifact is, how it was verified, and what its weights take, on one page for a browser.

The page loads nothing, and is the same bytes for the same figures.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from export.package.directory import write_file
from export.reporting.plots import comparisons_plot, parts_plot, share_of_limit
from export.reporting.weights import stored_weights, totals
from export.verification.comparison import Comparison, kl_limit
from export.verification.record import REPORT, VERIFICATION, Origin
from runtime.artifact.manifest import LOGITS_INDEX, MANIFEST, Manifest
from runtime.artifact.signature import SIGNATURE

TEMPLATE = "report.html.jinja"
UNLISTED = (MANIFEST, SIGNATURE, VERIFICATION, REPORT)  # which change when the report does, or after it


def write_report(
    directory: Path, manifest: Manifest, origin: Origin, comparisons: Sequence[Comparison], names: Iterable[str]
) -> None:
    """Write report.html into the artifact in `directory`, whose files are these `names`."""
    write_file(directory / REPORT, render(directory, manifest, origin, comparisons, names).encode())


def render(
    directory: Path, manifest: Manifest, origin: Origin, comparisons: Sequence[Comparison], names: Iterable[str]
) -> str:
    """The page's text."""
    weights, graph = stored_weights(directory / manifest.graph.file), manifest.graph
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    numbers, size = sum(weight.numbers for weight in weights), sum(weight.size for weight in weights)
    return environment.get_template(TEMPLATE).render(
        title=f"{manifest.model.type}, {manifest.model.parameters / 1e6:.1f} million parameters",
        origin=origin,
        graph=graph,
        facts=_facts(manifest),
        passed=all(each.passed for each in comparisons),
        comparisons=[(each, share_of_limit(each)) for each in comparisons],
        quality=_quality(comparisons, manifest),
        numbers=numbers,
        size=size,
        weights=weights,
        layers=totals(weights, "layer"),
        files=[(name, (directory / name).stat().st_size) for name in sorted(names) if name not in UNLISTED],
        producer=manifest.producer,
        parts_plot=Markup(parts_plot(totals(weights, "part"))),
        comparisons_plot=Markup(comparisons_plot(comparisons)),
    )


def _facts(manifest: Manifest) -> list[tuple[str, Any]]:
    """What a user of the graph needs to know."""
    graph, config = manifest.graph, manifest.model.config
    window = "none" if graph.window is None else f"{graph.window.keep} keys"
    chosen = f"the tokens that {LOGITS_INDEX} names" if graph.indexed else "the last token"
    facts = [
        ("parameters", f"{manifest.model.parameters:,}"),
        ("layers", config.get("num_hidden_layers")),
        ("hidden size", config.get("hidden_size")),
        ("vocabulary", graph.vocabulary),
        ("arithmetic", graph.dtype),
        ("keys and values in caches", graph.cache_dtype),
        ("quantisation", graph.quantization),
        ("most tokens of a slot", graph.max_length),
        ("most slots", graph.max_batch),
        ("logits of", "each token" if graph.logits == "all" else chosen),
        ("keep window", window),
        ("opset", graph.opset),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _quality(comparisons: Sequence[Comparison], manifest: Manifest) -> dict[str, float]:
    """Over the comparisons with the eager model: mean KL a position, the worst case's, and argmax agreement."""
    limit = kl_limit(manifest.graph)
    eager = [each for each in comparisons if each.kl_limit == limit]  # a quantised artifact has one between its graphs
    positions = sum(each.positions for each in eager)
    return {
        "positions": positions,
        "mean_kl": sum(each.mean_kl * each.positions for each in eager) / positions,
        "worst_kl": max(each.mean_kl for each in eager),
        "agreement": sum(each.argmax_agreement * each.positions for each in eager) / positions,
        "max_difference": max(each.max_difference for each in eager),
    }
