"""Random configurations, from the eager model through every kind of export to the engine.

    python -m test_trust.differential --configurations 500 --seed 0

Each configuration is saved in one of the formats of checkpoints, whole or in shards, and exported, which compares the
graph with the eager model on prompts, ragged batches and idle slots. Then the engine reads text of few distinct tokens
in chunks of random sizes, and its logits are held against one pass of the eager model over a batch that is padded.
The process ends with 1 where one of them failed.

An export may not verify because its type loses too much for these weights, as where rounding decides which keys or
experts are chosen. That is told apart from a fault by the eager model in the same type, beside itself in float64.

B batch, S tokens, V vocabulary.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import SMALL, randomise
from safetensors.torch import save_file
from test_export.conftest import HYBRID, save_checkpoint

from export import OnnxOptions, export_onnx
from export.quantization.schemes import SCHEMES
from export.targets.onnx_artifact import DTYPES
from runtime import load
from wm_models import FORMATS, CheemsForCausalLM, DogeForCausalLM, Format

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
OWN_LOSS = 1 / 4  # share of an export's divergence that the eager model in its type must have for it to be the type's
FORMATS_2025 = ("2025-08", "2025-04", "2025-01")  # beside those that save_pretrained writes
OWN_ROWS = 16
SHARD = 5  # tensors of a file, where a checkpoint has several


class Drawn(NamedTuple):
    """One configuration: the checkpoint's fields, the export's options, and how the checkpoint is stored.

    `format`: of 2025, or None for what save_pretrained writes, in one file. `shards`: whether there are several files.
    """

    fields: dict[str, Any]
    options: dict[str, Any]
    format: str | None = None
    shards: bool = False


def draw(chosen: random.Random) -> Drawn:
    """Sizes, positions, windows, biases, experts, activation and format of one model, and one kind of export."""
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
    options = {"max_length": 96, "max_batch": 2, **chosen.choice(EXPORTS)}
    form = chosen.choice(FORMATS_2025) if chosen.random() < 0.5 else None
    if "attn_layer_period" in fields and form is not None:
        form = "2025-01"
    if form == "2025-01":  # it has no windows
        fields = {name: value for name, value in fields.items() if "window" not in name}
    return Drawn(fields, options, form, shards=form is not None and chosen.random() < 0.5)


def save(drawn: Drawn, directory: Path) -> Path:
    """A checkpoint of random weights, stored as was drawn."""
    if drawn.format is None:
        return save_checkpoint(directory, **drawn.fields)
    model_type = "cheems" if "attn_layer_period" in drawn.fields else "doge"
    (form,) = (each for each in FORMATS if (each.name, each.model_type) == (drawn.format, model_type))
    values = earlier_fields(form, {**SMALL, **drawn.fields})
    config = form.config_class.from_dict(form.fields(dict(values)))
    model = (CheemsForCausalLM if model_type == "cheems" else DogeForCausalLM)(config)
    randomise(model)
    state = {form.stored_name(name): earlier_value(form, name, value) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    names = sorted(state)
    if not drawn.shards:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        return directory
    files = {f"model-{at:05}.safetensors": names[at : at + SHARD] for at in range(0, len(names), SHARD)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def earlier_fields(form: Format, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json as an earlier format names them; token routing, since no step graph has another."""
    values = {"expert_routing": "token", **values}
    if form.name == "2025-08":
        return values
    values["hidden_bias"] = values.pop("attention_bias", False)
    values.pop("mlp_bias", None)
    if form.name == "2025-01":
        del values["expert_routing"]
        rope = dict(values.pop("rope_parameters", {}))
        values["rope_theta"] = rope.pop("rope_theta", 1e4)
        if rope:
            values["rope_scaling"] = rope
        if values.get("is_moe"):
            per_head = values.pop("num_experts_per_tok")
            values |= {"num_cdmoe_heads": 2, "num_cdmoe_experts_per_head": per_head}
            values["num_cdmoe_experts"] = values.pop("num_experts")
    return values


def earlier_value(form: Format, name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor as an earlier format stores it: Cheems had A itself, and not log(-A)."""
    value = value.clone()
    return -value.exp() if form.model_type == "cheems" and name.endswith("ssd.A_log") else value


def run(drawn: Drawn, chosen: random.Random, root: Path) -> str:
    """What came of one configuration: "ok", "refused: …", "ill-conditioned: …" or "failed: …"."""
    try:
        source = save(drawn, root / "checkpoint")
    except (ValueError, KeyError) as error:
        return f"refused: {type(error).__name__}: {str(error)[:80]}"
    kind = CheemsForCausalLM if "attn_layer_period" in drawn.fields else DogeForCausalLM
    verdicts = export_onnx(source, root / "artifact", OnnxOptions(**drawn.options))
    if lost := [verdict for verdict in verdicts if not verdict.passed]:
        found = max(verdict.mean_kl for verdict in lost)
        own = own_loss(source, kind, drawn.options, chosen)
        if math.isfinite(found) and own >= OWN_LOSS * found:
            return f"ill-conditioned: the export diverges by {found:.1e}, the eager model in its type by {own:.1e}"
        return f"failed: {lost[0]}; the eager model in its type diverges by {own:.1e}"
    if drawn.options.keys() & {"dtype", "quantize"}:
        return "ok"
    few = chosen.sample(range(3, 60), 6)
    ids = [chosen.choice(few) for _ in range(TOKENS)]
    expected = padded_pass(kind.from_pretrained(source).eval(), ids, chosen)
    engine = load(root / "artifact", threads=1)
    at, worst = 0, 0.0
    while at < TOKENS:
        size = chosen.choice((1, 1, 3, 7))
        found = engine.append(np.array([ids[at : at + size]]))
        at = min(at + size, TOKENS)
        worst = max(worst, float(np.abs(found[0] - expected[at - 1]).max()))
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    return "ok" if worst <= limit else f"failed: chunks differ by {worst:.2e} from one pass (limit {limit:.2e})"


@torch.no_grad()
def padded_pass(model: Any, ids: list[int], chosen: random.Random) -> np.ndarray:
    """The eager model's logits (S, V) of `ids`, a row of a batch that is padded on one side beside a longer one."""
    padding = chosen.choice((0, 1, 5, 16))
    row, mask = torch.tensor(ids), torch.ones(len(ids), dtype=torch.long)
    sides = (padding, 0) if chosen.random() < 0.5 else (0, padding)
    other = torch.tensor([chosen.randrange(3, 60) for _ in range(len(ids) + padding)])
    batch = torch.stack([torch.nn.functional.pad(row, sides), other])
    mask = torch.stack([torch.nn.functional.pad(mask, sides), torch.ones_like(other)])
    logits = model(batch, attention_mask=mask).logits[0]
    return logits[sides[0] : sides[0] + len(ids)].numpy()


@torch.no_grad()
def own_loss(source: Path, kind: Any, options: dict[str, Any], chosen: random.Random) -> float:
    """The largest mean divergence of the eager model in an export's type from itself in float64, over rows of text.

    Half of the rows have few distinct tokens. For a quantised export the weights are rounded as it rounds them.
    """
    exact, narrow = kind.from_pretrained(source).eval().double(), kind.from_pretrained(source).eval()
    if "quantize" in options:
        round_weights(narrow, SCHEMES[options["quantize"]].block)
    narrow.to(DTYPES[options.get("dtype", "fp32")])
    every = range(exact.config.vocab_size)
    draws = [every, chosen.sample(every, 6)] * (OWN_ROWS // 2)
    ids = torch.tensor([[chosen.choice(draw) for _ in range(2 * TOKENS)] for draw in draws])
    logs, others = (model(ids).logits.double().log_softmax(-1) for model in (exact, narrow))
    return float((logs.exp() * (logs - others)).sum(-1).mean(-1).max())


def round_weights(model: torch.nn.Module, block: int) -> None:
    """Round every matrix to eight bits, in blocks of its rows."""
    for value in (value for value in model.parameters() if value.ndim == 2 and value.shape[1] % 8 == 0):
        size = math.gcd(block, value.shape[1])
        blocks = value.view(-1, size)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        value.copy_(((blocks / scale).round() * scale).view_as(value))


def differ(configurations: int, seed: int, first: int = 0) -> Counter[str]:
    """Run so many configurations; prints each that is not ok, and returns how many ended in each way."""
    counts: Counter[str] = Counter()
    for number in range(first, first + configurations):
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
    parser.add_argument("--first", type=int, default=0, help="the number of the first of them")
    given = parser.parse_args()
    began = time.monotonic()
    counts = differ(given.configurations, given.seed, given.first)
    print(f"{given.configurations} configurations, {time.monotonic() - began:.0f} s: {dict(counts)}")
    sys.exit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
