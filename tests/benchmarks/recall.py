"""Multi-query associative recall (paper, section 5): which sequence mixer finds again what it read?

python tests/benchmarks/recall.py [--lengths 128 256] [--pairs 8 16] [--kinds DMA SSD attention] [--steps 8000]

A row begins with pairs of a key and a value; later each key comes once more, at a random place, and its value is to be
told. Two layers of width 64, one head, no dropout, under torch.compile: dynamic mask attention, state space duality
alone, and attention without the bias (A kept at zero, so that every key has the same). So that a short training will
do, rows hold few pairs at first and more as soon as those are recalled, and half of what follows them are keys. The
table shows accuracies on fresh rows of all the pairs, each asked for once.
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM

VOCABULARY, WIDTH, ROWS = 128, 64, 32
RATE, CHECK = 5e-3, 100
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


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "SSD":
        return CheemsForCausalLM(CheemsConfig(**SIZES, attn_layer_period=3, attn_layer_offset=2))
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


def accuracy(kind: str, length: int, pairs: int, steps: int) -> tuple[float, int]:
    """The share of right answers after training, and its steps: `steps`, or fewer where nothing is left to learn."""
    model, draw = build(kind).train(), torch.Generator().manual_seed(0)
    compiled = torch.compile(model, fullgraph=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
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
    return right_share(model, length, pairs, torch.Generator().manual_seed(2), 16), step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--kinds", nargs="+", default=["DMA", "SSD", "attention"])
    parser.add_argument("--steps", type=int, default=8000)
    options = parser.parse_args()
    title = f"accuracy, and after how many steps; at most {options.steps}"
    table = Table("length", "pairs", *options.kinds, title=title, title_justify="left")
    for length in options.lengths:
        for pairs in options.pairs:
            cells = []
            for kind in options.kinds:
                started = time.monotonic()
                share, taken = accuracy(kind, length, pairs, options.steps)
                cells.append(f"{share:.1%} ({taken})")
                print(f"{length} {pairs} {kind}: {cells[-1]}, {time.monotonic() - started:.0f} s", flush=True)
            table.add_row(str(length), str(pairs), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
