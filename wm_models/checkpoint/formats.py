"""The published formats of checkpoints: how each names its tensors and the fields of its config.

A format differs from this project's own names in parts of tensors' names and in its config's fields. The numbers are
the same but where `convert` says otherwise.

A new format is one more `Format` in `FORMATS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from wm_models.configuration import EVERY_KEY, CheemsConfig, DogeConfig

Values = dict[str, Any]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One published format of a model's checkpoints.

    `model_type` is config.json's, and `config_class` that of the model which the checkpoints are loaded into. `names`
    maps parts of this project's tensor names (between dots) to theirs. `fields` maps their config to this project's.
    `convert` changes, in place, the tensors that mean something else there; they are under this project's names by
    then. `marks` are fields of its config.json by which it is told from a format with the same tensors.
    """

    name: str
    model_type: str
    config_class: type[DogeConfig] = DogeConfig
    names: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[Values], Values] = dict
    convert: Callable[[State, Values], None] | None = None
    marks: tuple[str, ...] = ()

    def stored_name(self, name: str) -> str:
        """This project's tensor name, as the format writes it."""
        return ".".join(self.names.get(part, part) for part in name.split("."))


def config_class(model_type: Any) -> type[DogeConfig] | None:
    """The config of the model that checkpoints of this `model_type` are loaded into; None where there is none."""
    return next((known.config_class for known in FORMATS if known.model_type == model_type), None)


def _rename(values: Values, **names: str) -> Values:
    """`values` with each field renamed where it is there."""
    return {names.get(name, name): value for name, value in values.items()}


def _fields_2025_08(values: Values) -> Values:
    return {**values, "num_bias_heads": values.get("num_attention_heads"), "query_key_norm": False}


def _fields_2025_04(values: Values) -> Values:
    values = _rename(values, hidden_bias="attention_bias")
    return {**_fields_2025_08(values), "mlp_bias": values.get("attention_bias", False)}


def _fields_2025_01(values: Values) -> Values:
    values = _rename(values, num_cdmoe_experts="num_experts", num_cdmoe_heads="num_expert_heads")
    values.pop("is_causal", None)  # see _convert_2025_01
    rope = values.setdefault("rope_scaling", {"rope_type": "dynamic", "factor": 4.0})
    if rope and rope.get("original_max_position_embeddings") == values.get("max_position_embeddings"):
        values["rope_scaling"] = {k: v for k, v in rope.items() if k != "original_max_position_embeddings"}
    per_head = values.pop("num_cdmoe_experts_per_head", None)
    if per_head is not None:
        values["num_experts_per_tok"] = per_head * values.get("num_expert_heads", 1)
    return {**_fields_2025_04(values), "keep_window_size": EVERY_KEY, "expert_routing": "product_keys"}


def _fields_doge2(values: Values) -> Values:
    """Doge2 (small-doge): each query head has a bias; keys are dropped only beyond `keep_window_size` tokens."""
    ratio, keep = values.get("dynamic_mask_ratio") or 0.0, values.get("keep_window_size", 2048)
    longest = values.get("max_position_embeddings", 2048)
    if ratio and longest > keep:
        raise ValueError(
            f"dynamic_mask_ratio is {ratio} over {longest} tokens; Doge2 drops keys beyond keep_window_size = {keep}, "
            "which no model here does: set max_position_embeddings to that"
        )
    heads = values.get("num_attention_heads")
    return {**values, "num_bias_heads": heads, "dynamic_mask_ratio": 0.0, "keep_window_size": EVERY_KEY}


def _convert_2025_01(state: State, values: Values) -> None:
    """`is_causal` turned the bias off. With A = 0 every bias is one, which the softmax cancels."""
    if values.get("is_causal"):
        for name in state:
            if name.endswith("self_attn.A"):
                state[name] = torch.zeros_like(state[name])


def _convert_cheems(state: State, values: Values) -> None:
    """A itself was stored, where this project stores log(-A)."""
    del values
    for name in [name for name in state if name.endswith("ssd.A_log")]:
        if not (state[name] < 0).all():
            raise ValueError(
                f"{name.removesuffix('_log')} reaches {state[name].max().item():g}; expected numbers below 0, "
                "for with others the state grows without bound: train it with negative ones"
            )
        state[name] = (-state[name]).log()


OLD_NAMES = {
    "embed_tokens": "word_embed",
    "norm": "final_layernorm",
    "input_layernorm": "pre_layernorm",
    "input_residual": "pre_residual.weight",
    "post_attention_layernorm": "post_layernorm",
    "post_attention_residual": "post_residual.weight",
    "mlp": "feed_forward",
    "score": "classifier",
}

CHEEMS_NAMES = {
    **OLD_NAMES,
    "self_attn": "attn",
    "A_log": "A",
    "input_layernorm": "pre_sequence_layernorm",
    "input_residual": "post_sequence_residual.weight",
    "post_attention_layernorm": "pre_state_layernorm",
    "post_attention_residual": "post_state_residual.weight",
}

MARKS_2025_04 = ("keep_window_size", "num_experts", "num_experts_per_tok")
MARKS_2025_01 = ("dynamic_mask_ratio", "is_causal", "num_cdmoe_experts", "rope_scaling")

# In the order in which they are tried. Without experts 2025-04 and 2025-01 have the same tensors.
FORMATS: list[Format] = [
    Format("wm-models", DogeConfig.model_type),
    Format("transformers", "doge"),
    Format("2025-08", "doge", fields=_fields_2025_08),
    Format("2025-04", "doge", names=OLD_NAMES, fields=_fields_2025_04, marks=MARKS_2025_04),
    Format("2025-01", "doge", names=OLD_NAMES, fields=_fields_2025_01, convert=_convert_2025_01, marks=MARKS_2025_01),
    Format("doge2", "doge2", fields=_fields_doge2),
    Format("wm-models", "cheems", CheemsConfig),
    Format("2025-01", "cheems", CheemsConfig, CHEEMS_NAMES, _fields_2025_01, _convert_cheems),
]
