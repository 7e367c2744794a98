"""Configuration of Doge: the fields of `transformers`' own `DogeConfig`, checked, and the router's choice."""

import math
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict


@strict
class DogeConfig(transformers.DogeConfig):
    """Hyper-parameters of a Doge model (paper, section 3; names as in `transformers.DogeConfig`).

    `expert_routing` says how a CDMoE layer splits the router's 2n outputs into two lists of n scores:
    `"token"` splits each token's own row, so a token's experts depend on that token alone;
    `"batch"` splits the flattened batch in two halves, as the published CDMoE weights were trained, which mixes
    tokens: such a model is not causal over a full pass and cannot be exported or batched.
    A config file that lacks the field was written by `transformers` and means `"batch"`.

    Raises ValueError for sizes that do not fit each other.
    """

    expert_routing: str = "token"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _check_multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.key_value_heads)
        if self.head_size % 2:
            raise ValueError(f"the head size hidden_size / num_attention_heads is {self.head_size}; RoPE needs it even")
        if self.keep_window_size < 1:
            raise ValueError(f"keep_window_size is {self.keep_window_size}; expected at least 1")
        if self.expert_routing not in ("token", "batch"):
            raise ValueError(f"expert_routing is {self.expert_routing!r}; expected 'token' or 'batch'")
        if self.is_moe:
            if self.expert_keys**2 != self.num_experts:
                raise ValueError(f"num_experts is {self.num_experts}; expected a square number")
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to {self.num_experts}")

    @property
    def head_size(self) -> int:
        """d, the size of one attention head."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """K, by default as many as query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def expert_keys(self) -> int:
        """n = sqrt(E), the length of each of the router's two score lists."""
        return math.isqrt(self.num_experts)

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE's type and parameters, which transformers fills in from any of their older spellings."""
        return {**(self.rope_parameters or {})}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DogeConfig":
        """A config from its JSON object; see `expert_routing` for what a missing routing means."""
        return super().from_dict({"expert_routing": "batch", **config_dict}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and always the routing, whose absence means something else."""
        return {**super().to_diff_dict(), "expert_routing": self.expert_routing}


@strict
class CheemsConfig(DogeConfig):
    """Hyper-parameters of a Cheems model: those of Doge, and which of its layers are attention.

    Layer i is attention where `i % attn_layer_period == attn_layer_offset`, else SSD, whose chunked form takes at most
    `ssd_chunk_size` tokens a chunk. A period that leaves no attention or no SSD layer is allowed; the log says so.
    """

    model_type = "cheems"
    base_model_tp_plan = None
    attn_layer_period: int = 8
    attn_layer_offset: int = 7
    ssd_chunk_size: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("attn_layer_period", "ssd_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.attn_layer_offset < self.attn_layer_period:
            raise ValueError(
                f"attn_layer_offset is {self.attn_layer_offset}; expected 0 to attn_layer_period - 1, "
                f"{self.attn_layer_period - 1}"
            )
        if self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window}; Cheems has none, so expected None")
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Each layer's kind, in transformers' words: its caches read them.

        They count tokens in attention layers only. Where there is none, the first layer is called "hybrid", which
        gives it room to count them.
        """
        types = [
            "full_attention" if layer % self.attn_layer_period == self.attn_layer_offset else "linear_attention"
            for layer in range(self.num_hidden_layers)
        ]
        return types if "full_attention" in types else ["hybrid", *types[1:]]


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name} is {value}; expected a multiple of {of}, {divisor}")
