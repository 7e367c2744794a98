"""Cross domain mixture of experts beside transformers' own with the same weights, and beside a top-2 mixture.

python tests/benchmarks/experts.py        (float32, hidden 1024, one thread; milliseconds)
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers.models.doge.modeling_doge import DogeCDMoE

from wm_models import DogeConfig
from wm_models.layers.experts import ExpertMLP, feed_forward

HIDDEN, EXPERTS, PER_TOKEN = 1024, 16384, 64


def fastest(runs: dict[str, Callable[[], object]], seconds: float = 6.0) -> dict[str, float]:
    """Milliseconds of CPU time of each one's fastest call: what other work on the machine disturbs least.

    They take turns, on one thread: threads that wait for each other measure the machine's load.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(runs))]) < 3:
        for name, run in runs.items():
            started = time.thread_time()
            run()
            times[name].append(time.thread_time() - started)
    return {name: min(found) * 1e3 for name, found in times.items()}


def fields(experts: int, per_token: int, inner: int) -> dict[str, object]:
    return {
        "hidden_size": HIDDEN, "num_attention_heads": 8, "intermediate_size": inner, "is_moe": True,
        "num_experts": experts, "num_experts_per_tok": per_token,
    }  # fmt: skip


def against_transformers(inner: int) -> Table:
    theirs = DogeCDMoE(transformers.DogeConfig(**fields(EXPERTS, PER_TOKEN, inner))).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.02)
    mine = feed_forward(DogeConfig(**fields(EXPERTS, PER_TOKEN, inner), expert_routing="batch")).eval()
    mine.load_state_dict(theirs.state_dict(), strict=False)
    compiled = torch.compile(mine, fullgraph=True, dynamic=False)
    columns = ("tokens", "transformers", "this", "times", "this, compiled", "times")
    title = f"{EXPERTS} experts, {PER_TOKEN} a token, shared MLP of {inner}"
    table = Table(*columns, title=title, title_justify="left")
    for tokens in (1, 512):
        x = torch.randn(1, tokens, HIDDEN)
        assert torch.allclose(theirs(x)[0], mine(x)[0], atol=1e-5)
        modules = {"theirs": theirs, "mine": mine, "compiled": compiled}
        found = fastest({name: partial(module, x) for name, module in modules.items()})
        table.add_row(
            str(tokens), f"{found['theirs']:.3f}", f"{found['mine']:.3f}", f"{found['theirs'] / found['mine']:.1f}",
            f"{found['compiled']:.3f}", f"{found['theirs'] / found['compiled']:.1f}",
        )  # fmt: skip
    return table


class TopTwo(nn.Module):
    """An ordinary mixture: a router over all E experts, gated MLPs of which each token takes two."""

    def __init__(self, hidden: int, experts: int, inner: int):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(experts, hidden, inner) * 0.02) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, D) -> (N, D): the tokens of each chosen expert go through it together."""
        weights, chosen = self.router(x).topk(2, dim=-1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            rows = x[token]
            inner = F.silu(rows @ self.gate[expert]) * (rows @ self.up[expert])
            y.index_add_(0, token, (inner @ self.down[expert].T) * weights[token, slot, None])
        return y


def routed(mixture: ExpertMLP, x: torch.Tensor) -> torch.Tensor:
    """The mixture without its shared MLP: x (N, D) -> (N, D)."""
    return mixture.mix(x, *mixture.route(mixture.scores(x[None])))


def against_top_two() -> Table:
    """As many active parameters, k rows of two tables against two gated MLPs: 2k·D = 2 · 3·D·inner."""
    columns = ("experts", "tokens", "top-2", "this", "times", "parameters: top-2", "this")
    table = Table(*columns, title="Routed part alone, as many active parameters a token", title_justify="left")
    for experts in (1024, 4096, 16384):
        inner = 8
        top_two = TopTwo(HIDDEN, experts, inner).eval()
        mixture = feed_forward(DogeConfig(**fields(experts, 3 * inner, 8))).eval()
        assert isinstance(mixture, ExpertMLP)
        for tokens in (1, 512):
            x = torch.randn(tokens, HIDDEN)
            found = fastest({"top": partial(top_two, x), "this": partial(routed, mixture, x)})
            tables = 2 * mixture.down_embed.weight.numel() + mixture.router_gate.weight.numel()
            table.add_row(
                str(experts), str(tokens), f"{found['top']:.3f}", f"{found['this']:.3f}",
                f"{found['top'] / found['this']:.1f}",
                f"{sum(p.numel() for p in top_two.parameters()) / 1e6:.0f}M", f"{tables / 1e6:.0f}M",
            )  # fmt: skip
    return table


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=110)
    console.print(against_transformers(inner=2048))
    console.print(against_transformers(inner=8))
    console.print(against_top_two())


if __name__ == "__main__":
    main()
