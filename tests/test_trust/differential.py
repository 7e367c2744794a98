"""Random configurations, from the eager model through every kind of export to the engine.

    python -m test_trust.differential --configurations 500 --seed 0

Each configuration is exported, which compares the graph with the eager model on prompts, ragged batches and idle slots;
then the engine reads text of few distinct tokens in chunks of another size, and its logits are held against one pass of
the eager model. The process ends with 1 where one of them failed.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from test_export.conftest import HYBRID, save_checkpoint

from export import OnnxOptions, export_onnx
from runtime import load
from wm_models import CheemsForCausalLM, DogeForCausalLM

ROPES = (
    None,
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
)
EXPORTS = ({}, {}, {"dtype": "fp16"}, {"dtype": "bf16"}, {"quantize": "int8"}, {"logits": "all"})
TOKENS = 40  # a prompt and steps, of few distinct tokens
TOLERANCE = 1e-4  # of the largest logit, float32 alone: other types are held to their limits by the export


class Drawn(NamedTuple):
    """One configuration: the checkpoint's fields and the export's options."""

    fields: dict[str, Any]
    options: dict[str, Any]


def draw(chosen: random.Random) -> Drawn:
    """Sizes, positions, windows, biases, experts and activation of one model, and one kind of export."""
    kv_heads, groups = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 4))
    size = chosen.choice((8, 16, 24, 32))
    fields: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * groups,
        "head_dim": size,
        "hidden_size": kv_heads * groups * size,
        "intermediate_size": chosen.choice((16, 40, 64)),
        "num_hidden_layers": chosen.choice((1, 2, 3)),
        "tie_word_embeddings": chosen.random() < 0.5,
        "attention_bias": chosen.random() < 0.3,
        "mlp_bias": chosen.random() < 0.3,
        "hidden_act": chosen.choice(("silu", "gelu", "relu", "gelu_pytorch_tanh")),
        "max_position_embeddings": 128,
    }
    if rope := chosen.choice(ROPES):
        fields["rope_parameters"] = rope
    window = chosen.choice(("none", "none", "keep", "sliding"))
    if window != "none":
        fields[{"keep": "keep_window_size", "sliding": "sliding_window"}[window]] = chosen.choice((8, 16, 33))
    if chosen.random() < 0.2:
        fields |= {"is_moe": True, "num_experts": 16, "num_experts_per_tok": chosen.choice((1, 3))}
    if chosen.random() < 0.15 and window != "sliding":
        fields |= HYBRID
    return Drawn(fields, {"max_length": 96, "max_batch": 2, **chosen.choice(EXPORTS)})


def run(drawn: Drawn, chosen: random.Random, root: Path) -> str:
    """What came of one configuration: "ok", "refused: …" or "failed: …"."""
    try:
        source = save_checkpoint(root / "checkpoint", **drawn.fields)
    except (ValueError, KeyError) as error:
        return f"refused: {type(error).__name__}: {str(error)[:80]}"
    verdicts = export_onnx(source, root / "artifact", OnnxOptions(**drawn.options))
    if lost := [verdict for verdict in verdicts if not verdict.passed]:
        return f"failed: {lost[0]}"
    if drawn.options.keys() & {"dtype", "quantize"}:
        return "ok"
    few = chosen.sample(range(3, 60), 6)
    ids = [chosen.choice(few) for _ in range(TOKENS)]
    kind = CheemsForCausalLM if "attn_layer_period" in drawn.fields else DogeForCausalLM
    with torch.no_grad():
        expected = kind.from_pretrained(source).eval()(torch.tensor([ids])).logits[0].numpy()
    engine = load(root / "artifact", threads=1)
    at, worst = 0, 0.0
    while at < TOKENS:
        size = chosen.choice((1, 1, 3, 7))
        found = engine.append(np.array([ids[at : at + size]]))
        at = min(at + size, TOKENS)
        worst = max(worst, float(np.abs(found[0] - expected[at - 1]).max()))
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    return "ok" if worst <= limit else f"failed: chunks differ by {worst:.2e} from one pass (limit {limit:.2e})"


def differ(configurations: int, seed: int) -> Counter[str]:
    """Run so many configurations; prints each that is not ok, and returns how many ended in each way."""
    counts: Counter[str] = Counter()
    for number in range(configurations):
        chosen = random.Random(f"{seed}/{number}")
        drawn = draw(chosen)
        torch.manual_seed(number)
        with tempfile.TemporaryDirectory() as root:
            try:
                result = run(drawn, chosen, Path(root))
            except Exception as error:
                result = f"failed: {type(error).__name__}: {str(error)[:300]}"
        counts[result.partition(":")[0]] += 1
        print(f"\r{number + 1}: {dict(counts)}", end="", file=sys.stderr, flush=True)
        if result != "ok":
            print(f"{number}: {result}\n    {drawn}", flush=True)
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random configurations from eager to the engine.")
    parser.add_argument("--configurations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    counts = differ(given.configurations, given.seed)
    print(f"{given.configurations} configurations, {time.monotonic() - began:.0f} s: {dict(counts)}")
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
