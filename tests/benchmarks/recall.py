"""Multi-query associative recall (paper, section 5): which sequence mixer finds again what it read?

python tests/benchmarks/recall.py [--lengths 128 256] [--pairs 8 16] [--kinds DMA SSD "free SSD" attention]
                                  [--rates 2e-3 5e-3 1e-2] [--steps 8000] [--out FILE.jsonl]

A row begins with pairs of a key and a value; later each key comes once more, at a random place, and its value is to be
told. Two layers of width 64, one head, no dropout, under torch.compile: dynamic mask attention, state space duality
alone as published and with a decay that is free to learn, and attention without the bias (A kept at zero, so that every
key has the same). So that a short training will do, rows hold few pairs at first and more as soon as those are
recalled, and half of what follows them are keys. The table shows accuracies on fresh rows of all the pairs, each asked
for once, at the best of the learning rates. Runs that FILE.jsonl has already are not repeated.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM

VOCABULARY, WIDTH, ROWS = 128, 64, 32
CHECK = 100
KINDS = ("DMA", "SSD", "free SSD", "attention")
FIRST, LEARNT, ENOUGH = 4, 0.9, 0.998  # pairs at first; shares of right answers that double them, and that will do
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},  # rows are short: neighbours should differ
    "use_cache": False,
}


def batch(length: int, pairs: int, draw: torch.Generator, often: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and labels, (ROWS, length) each: keys are below V / 2, values from there on; label s + 1 answers key s.

    Each key is asked for once or, `often`, keys drawn at random in half of the places.
    """
    half = VOCABULARY // 2
    keys = torch.rand(ROWS, half - 1, generator=draw).argsort(1)[:, :pairs] + 1
    values = torch.randint(half, VOCABULARY, (ROWS, pairs), generator=draw)
    ids = torch.zeros(ROWS, length, dtype=torch.long)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    asked = torch.arange(pairs).expand(ROWS, -1)
    if often:
        asked = torch.randint(0, pairs, (ROWS, length // 2 - pairs), generator=draw)
    places = torch.rand(ROWS, length - 2 * pairs - 1, generator=draw).argsort(1)[:, : asked.shape[1]] + 2 * pairs
    ids.scatter_(1, places, keys.gather(1, asked))
    return ids, torch.full_like(ids, -100).scatter_(1, places + 1, values.gather(1, asked))


def keep_unbiased(model: torch.nn.Module) -> None:
    """Let A stay at zero, where a model starts it, so that every key has the same bias."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith((".A", ".dt_proj.weight")))


def free_decay(model: CheemsForCausalLM) -> None:
    """Start A at -1 and dt, whose bias training moves, at 0.001 to 0.1, as in Mamba-2: little is forgotten at first."""
    for layer in model.model.layers:
        dt = torch.empty_like(layer.ssd.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        layer.ssd.dt_proj.bias.data.copy_(dt.expm1().log())
        layer.ssd.A_log.data.zero_()


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if "SSD" in kind:
        free = kind == "free SSD"
        model = CheemsForCausalLM(CheemsConfig(**SIZES, attn_layer_period=3, attn_layer_offset=2, attention_bias=free))
        if free:
            free_decay(model)
        return model
    model = DogeForCausalLM(DogeConfig(**SIZES))
    if kind == "attention":
        keep_unbiased(model)
    return model


def right_share(model: torch.nn.Module, length: int, pairs: int, draw: torch.Generator, batches: int) -> float:
    """The share of right answers on fresh rows."""
    right = total = 0
    with torch.no_grad():
        for _ in range(batches):
            ids, labels = batch(length, pairs, draw, often=False)
            found, wanted = model.eval()(input_ids=ids).logits[:, :-1].argmax(-1), labels[:, 1:]
            right += int((found == wanted).sum())
            total += int((wanted != -100).sum())
    model.train()
    return right / total


def run(kind: str, rate: float, length: int, pairs: int, steps: int) -> dict[str, Any]:
    """One training: its share of right answers, and its steps, fewer than `steps` where nothing is left to learn."""
    started = time.process_time()
    model, draw = build(kind).train(), torch.Generator().manual_seed(0)
    compiled = torch.compile(model, fullgraph=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) is deep] for deep in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    check, most = torch.Generator().manual_seed(1), min(FIRST, pairs)
    for step in range(1, steps + 1):
        some = int(torch.randint(2, most + 1, (1,), generator=draw))
        ids, labels = batch(length, some, draw, often=True)
        compiled(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % CHECK == 0:
            right = right_share(model, length, most, check, 2)
            if most < pairs and right > LEARNT:
                most = min(2 * most, pairs)
            elif most == pairs and right > ENOUGH:
                break
    share = right_share(model, length, pairs, torch.Generator().manual_seed(2), 16)
    cell = {"kind": kind, "rate": rate, "length": length, "pairs": pairs, "most": steps}
    return {**cell, "share": share, "steps": step, "cpu_seconds": time.process_time() - started}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--out", type=Path, help="runs, a line each")
    options = parser.parse_args()
    earlier = [] if options.out is None or not options.out.exists() else options.out.read_text().splitlines()
    known = {tuple(cell.values())[:5]: cell for cell in map(json.loads, earlier)}
    title = f"accuracy, at the best rate, and after how many steps; at most {options.steps}"
    table = Table("length", "pairs", *options.kinds, title=title, title_justify="left")
    for length in options.lengths:
        for pairs in options.pairs:
            cells = []
            for kind in options.kinds:
                runs = []
                for rate in options.rates:
                    cell = known.get((kind, rate, length, pairs, options.steps))
                    if cell is None:
                        cell = run(kind, rate, length, pairs, options.steps)
                        print(json.dumps(cell), flush=True)
                        if options.out is not None:
                            with options.out.open("a") as file:
                                file.write(json.dumps(cell) + "\n")
                    runs.append(cell)
                best = max(runs, key=lambda cell: (cell["share"], -cell["steps"]))
                cells.append(f"{best['share']:.1%} ({best['rate']:g}, {best['steps']})")
            table.add_row(str(length), str(pairs), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
