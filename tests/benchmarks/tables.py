"""The paper's comparisons in small: perplexity over tokens, of whole models and of one part exchanged at a time.

python tests/benchmarks/tables.py [--tokens 1000000] [--rates 2e-3 4e-3 8e-3] [--kinds Doge Llama ...]
                                  [--out FILE.jsonl] [--plot FILE.png]

Every model has the same width, layers, heads, tokenizer, data, order of rows, tokens and schedule, and is trained once
with each learning rate; its best one counts. Text is the standard library, what is held out is what the shipped model
never saw. `Llama` is transformers' own. Runs that FILE.jsonl has already are not repeated.

B rows, S tokens of a row, D hidden size, E experts.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experts import TopTwo
from matplotlib.figure import Figure
from recall import keep_unbiased
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from wm_models import MIXERS, CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM, shipped_checkpoint
from wm_models.layers.ssd import SSDMixer
from wm_models.losses import IGNORED
from wm_models.training.recipe import Recipe
from wm_models.training.rows import Rows
from wm_models.training.run import prepare

LENGTH, BATCH, HELD_OUT, POINTS = 256, 8, 96, 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "use_cache": False,
}
EXPERTS = {"is_moe": True, "num_experts": 1024, "num_experts_per_tok": 16}
ALL_SSD = {"attn_layer_period": 5, "attn_layer_offset": 4}  # of four layers none is attention
HYBRID = {"attn_layer_period": 4, "attn_layer_offset": 3}


class Unrotated:
    """A context without RoPE."""

    def __init__(self, context: Any):
        self._context = context

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class UnrotatedSSD(SSDMixer):
    """State space duality without RoPE on b and c."""

    def forward(self, u: torch.Tensor, context: Any) -> torch.Tensor:
        return super().forward(u, Unrotated(context))


class Mixture(nn.Module):
    """A top-2 mixture where a decoder layer has its MLP: (B, S, D) -> (B, S, D). Four experts, half as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = TopTwo(SIZES["hidden_size"], 4, SIZES["intermediate_size"] // 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.mixture(x.flatten(0, 1)).view_as(x), None


def doge(**fields: Any) -> DogeForCausalLM:
    return DogeForCausalLM(DogeConfig(**SIZES, **fields))


def without_bias(**fields: Any) -> DogeForCausalLM:
    """Attention to every key alike: A stays zero."""
    model = doge(**fields)
    keep_unbiased(model)
    return model


def with_mixture(**fields: Any) -> DogeForCausalLM:
    model = doge(**fields)
    for layer in model.model.layers:
        layer.mlp = Mixture()
    return model


def cheems(**fields: Any) -> CheemsForCausalLM:
    return CheemsForCausalLM(CheemsConfig(**SIZES, **fields))


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **fields))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "Doge": doge,
    "Doge, CDMoE": lambda **fields: doge(**EXPERTS, **fields),
    "Cheems": lambda **fields: cheems(**HYBRID, **fields),
    "Llama": llama,
    "Doge, 64 keys": lambda **fields: doge(keep_window_size=64, **fields),
    "Doge, no bias": without_bias,
    "Doge, top-2 mixture": with_mixture,
    "SSD alone": lambda **fields: cheems(**ALL_SSD, **fields),
    "SSD alone, no RoPE": lambda **fields: cheems(**ALL_SSD, sequence_mixer="unrotated", **fields),
    "Cheems, no RoPE in SSD": lambda **fields: cheems(**HYBRID, sequence_mixer="unrotated", **fields),
}
PANELS = {
    "whole models": ("Doge", "Doge, CDMoE", "Cheems", "Llama"),
    "attention": ("Doge", "Doge, 64 keys", "Doge, no bias"),
    "state spaces": ("SSD alone", "SSD alone, no RoPE", "Cheems", "Cheems, no RoPE in SSD"),
    "feed forward": ("Doge", "Doge, CDMoE", "Doge, top-2 mixture"),
}


def batches(rows: Rows, count: int) -> torch.utils.data.DataLoader[dict[str, torch.Tensor]]:
    """`count` batches, shuffled, the same for every model."""
    draw = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(rows), generator=draw) for _ in range(-(-count * BATCH // len(rows)))])
    return torch.utils.data.DataLoader(rows, BATCH, sampler=order[: count * BATCH].tolist())


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows) -> float:
    """The mean loss of a predicted token, nats, over rows spread evenly."""
    total = count = 0.0
    chosen = torch.linspace(0, len(rows) - 1, HELD_OUT).long().tolist()
    model.eval()
    for batch in torch.utils.data.DataLoader(rows, BATCH, sampler=chosen):
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    model.train()
    return total / count


def train(kind: str, rate: float, tokens: int, data: Any) -> dict[str, Any]:
    """One run: held-out perplexity after each of `POINTS` parts of the tokens."""
    torch.manual_seed(0)
    model = KINDS[kind](vocab_size=len(data.tokenizer)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = tokens // (LENGTH * BATCH)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup, decay = max(1, steps // 20), max(1, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, (steps - step) / decay)
    )
    started, curve = time.process_time(), []
    for step, batch in enumerate(tqdm(batches(data.train_rows, steps), f"{kind}, {rate:g}", mininterval=5), 1):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step * POINTS // steps > (step - 1) * POINTS // steps:
            loss = held_out_loss(model, data.held_out_rows)
            curve.append((step * LENGTH * BATCH, math.exp(loss) if math.isfinite(loss) else None))
    return {
        "kind": kind,
        "rate": rate,
        "tokens": tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve,
        "cpu_seconds": time.process_time() - started,
    }


def best_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind the run that ends lowest."""
    best: dict[str, dict[str, Any]] = {}
    for run in runs:
        last = run["curve"][-1][1]
        if last is not None and (run["kind"] not in best or last < best[run["kind"]]["curve"][-1][1]):
            best[run["kind"]] = run
    return best


def draw(best: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure((11, 8), layout="constrained")
    for axes, (title, kinds) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for kind in kinds:
            if kind in best:
                axes.plot(*zip(*best[kind]["curve"], strict=True), marker="o", markersize=3, label=kind)
        axes.set(title=title, xlabel="tokens", ylabel="held-out perplexity", yscale="log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="runs, a line each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    MIXERS["unrotated"] = UnrotatedSSD
    runs = []
    if options.out is not None and options.out.exists():
        runs = [json.loads(line) for line in options.out.read_text().splitlines()]
    known = {(run["kind"], run["rate"], run["tokens"]) for run in runs}
    changes = {"vocabulary": 0, "tokenizer": str(shipped_checkpoint()), "sequence_length": LENGTH, "batch_size": BATCH}
    data = prepare(Recipe.load("doge-3m", changes))
    for kind in options.kinds:
        for rate in options.rates:
            if (kind, rate, options.tokens) not in known:
                runs.append(train(kind, rate, options.tokens, data))
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
    runs = [run for run in runs if run["tokens"] == options.tokens]
    best = best_of(runs)
    table = Table("", "parameters", "best rate", "perplexity", "at other rates", "CPU s", title_justify="left")
    for kind, run in best.items():
        others = [other for other in runs if other["kind"] == kind and other is not run]
        worse = ", ".join(f"{other['curve'][-1][1] or math.nan:.2f} ({other['rate']:g})" for other in others)
        table.add_row(
            kind, f"{run['parameters'] / 1e6:.2f}M", f"{run['rate']:g}", f"{run['curve'][-1][1]:.2f}", worse,
            f"{run['cpu_seconds']:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)
    if options.plot is not None:
        draw(best, options.plot)


if __name__ == "__main__":
    main()
