"""The roofline of a decode step: what it reads and computes by module, and tokens/s that a card's memory allows."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.bench.cards import CARDS, Card
from export.bench.cost import PRECISIONS, Cost, Precision, graph_parts, step_costs, step_operators, step_seconds
from export.targets.base import Table
from runtime.artifact.integrity import read_artifact
from runtime.console import option
from runtime.errors import RequestError

SHARE = 0.8  # of the published bandwidth: what well-made kernels reach
CONTEXT = 1024  # tokens, where an artifact holds so many
DEPTH = 3  # layers.0.mlp.gate_proj is counted as layers.0.mlp


@dataclass(frozen=True)
class RooflineOptions:
    """The step that is counted."""

    batch: int = option(1, "Slots that decode together.")
    context: int | None = option(None, f"Tokens in each slot. Default: {CONTEXT}, or the artifact's most.")
    as_json: bool = option(False, "Print JSON, with every module, instead of tables.", flag="--json")


@dataclass(frozen=True)
class Roofline:
    """Costs of a decode step by precision: of every module that reads weights or caches, in the graph's order."""

    path: Path
    batch: int
    context: int
    operators: int
    costs: dict[str, list[Cost]]

    def tokens_per_second(self, card: Card, precision: Precision) -> float:
        """Of all slots together, at `SHARE` of the card's bandwidth. Launches and the host's work are not in it."""
        costs = self.costs[precision.name]
        return self.batch / step_seconds(costs, SHARE * card.bandwidth, card.rate(precision.width))


def roofline(directory: Path, batch: int = 1, context: int | None = None) -> Roofline:
    """Count a decode step of an artifact in its graph, at each precision; nothing is run.

    Raises `RequestError` for a batch or a context that no step has.
    """
    artifact = read_artifact(directory, allow_unverified=True)
    most = artifact.graph.max_length
    tokens = min(CONTEXT, most) if context is None else context
    if batch < 1:
        raise RequestError(f"--batch is {batch}; expected 1 or more")
    if not 1 <= tokens <= most:
        raise RequestError(f"--context is {tokens}; {directory} holds 1 to {most} tokens")
    parts = graph_parts(artifact)
    costs = {name: step_costs(artifact, parts, precision, batch, tokens) for name, precision in PRECISIONS.items()}
    return Roofline(directory, batch, tokens, step_operators(artifact), costs)


def as_json(found: Roofline) -> dict[str, Any]:
    """All of it: each module's bytes and operations at each precision, and tokens/s by card and precision."""
    rates = {
        card.name: {name: found.tokens_per_second(card, precision) for name, precision in PRECISIONS.items()}
        for card in CARDS
    }
    return {
        "artifact": str(found.path),
        "batch": found.batch,
        "context": found.context,
        "operators": found.operators,
        "modules": {name: [asdict(cost) for cost in costs] for name, costs in found.costs.items()},
        "share_of_bandwidth": SHARE,
        "tokens_per_second": rates,
        "cards": [asdict(card) for card in CARDS],
    }


def tables(found: Roofline) -> list[Table]:
    """What a step reads and computes by kind of layer, and tokens/s by card."""
    step = f"{found.path}: a decode step, batch {found.batch}, context {found.context}, {found.operators} operators"
    names = list(PRECISIONS)
    layers = {name: _by_layer(costs) for name, costs in found.costs.items()}
    rows = []
    for same in _kinds(layers[names[0]]):
        costs = [layers[name][same[0]] for name in names]
        totals = [_mega(cost.total) for cost in costs]
        rows.append([_pattern(same[0]), str(len(same)), _mega(costs[0].operations), *totals])
    whole = {name: _sum("all", costs) for name, costs in found.costs.items()}
    rows.append(["all", "", _mega(whole[names[0]].operations), *(_mega(whole[name].total) for name in names)])
    rows.append(["of it caches", "", "", *(_mega(whole[name].caches) for name in names)])
    speeds = [
        [
            card.name, f"{card.bandwidth / 1e9:.0f}",
            *(f"{found.tokens_per_second(card, PRECISIONS[name]):.0f}" for name in names), card.source,
        ]
        for card in CARDS
    ]  # fmt: skip
    return [
        Table(step, ["module", "times", "MFLOP", *(f"{name}, MB" for name in names)], rows),
        Table(f"tokens/s at {SHARE:.0%} of a card's bandwidth", ["card", "GB/s", *names, "published in"], speeds),
    ]


def _by_layer(costs: list[Cost]) -> dict[str, Cost]:
    """The sums over what is inside a layer's attention, its feed-forward part and the like, by path."""
    modules: dict[str, list[Cost]] = {}
    for cost in costs:
        modules.setdefault(".".join(cost.module.split(".")[:DEPTH]), []).append(cost)
    return {name: _sum(name, inside) for name, inside in modules.items()}


def _kinds(layers: dict[str, Cost]) -> list[list[str]]:
    """The paths that differ in the layer's number alone and cost the same, together."""
    found: dict[tuple[str, float, float], list[str]] = {}
    for name, cost in layers.items():
        found.setdefault((_pattern(name), cost.operations, cost.total), []).append(name)
    return list(found.values())


def _pattern(module: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", module) or "the graph"


def _sum(name: str, costs: list[Cost]) -> Cost:
    return Cost(name, *(sum(getattr(cost, part) for cost in costs) for part in ("weights", "caches", "operations")))


def _mega(value: float) -> str:
    return f"{value / 1e6:.3f}" if value < 1e5 else f"{value / 1e6:.1f}"
