"""Configuration of Doge: the fields of `transformers`' own `DogeConfig`, checked, and a switch for each difference
between the published models."""

import math
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

EVERY_KEY = 2**31 - 1  # a keep window for models that have none
MOST_LAYERS = 4096  # each is an object of its own, on whatever device; a file may ask for any number
ROUTINGS = ("token", "batch", "product_keys")
# The sequence mixers that a config may name, by name: `layers/mixers.py` enters those of this package, and a program
# may enter its own.
MIXERS: dict[str, type[Any]] = {}


@strict
class DogeConfig(transformers.DogeConfig):
    """Hyper-parameters of a Doge model (paper, section 3; names as in `transformers.DogeConfig`).

    Attention: `num_bias_heads`, rows of the bias, one for each key/value head (None) or for each query head;
    `query_key_norm`, whether queries and keys are normalised before RoPE; `keep_window_size`, the keys that a query
    attends to at most; `dynamic_mask_ratio`, the share of all keys, those of smallest bias, that nothing attends to.

    `expert_routing` says where a CDMoE layer takes its two lists of n scores from. `"token"` splits the gate's 2n
    outputs for each token, so a token's experts depend on that token alone. `"batch"` splits the gate's outputs for
    the flattened batch in two halves, as the published CDMoE weights were trained, which mixes tokens: such a model is
    not causal over a full pass and cannot be exported or batched. A config file that lacks the field was written by
    `transformers` and means `"batch"`. `"product_keys"` compares queries of `expert_retrieval_size` with learned keys,
    for each of `num_expert_heads` heads, which share the `num_experts_per_tok` experts.

    Where `transformers`' own `doge` has all that a config says, it is written as that, else as `wm_doge`.
    Raises ValueError for sizes that do not fit each other.
    """

    model_type = "wm_doge"

    num_bias_heads: int | None = None
    query_key_norm: bool = True
    dynamic_mask_ratio: float | int = 0.0
    expert_routing: str = "token"
    num_expert_heads: int = 1
    expert_retrieval_size: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; expected at most {MOST_LAYERS}")
        super().__post_init__(**kwargs)
        heads, narrow = self.num_attention_heads, self.key_value_heads
        _check_multiple("hidden_size", self.hidden_size, "num_attention_heads", heads)
        _check_multiple("num_attention_heads", heads, "num_key_value_heads", narrow)
        if self.head_size % 2:
            raise ValueError(f"the head size hidden_size / num_attention_heads is {self.head_size}; RoPE needs it even")
        if self.bias_heads not in (narrow, heads):
            raise ValueError(
                f"num_bias_heads is {self.bias_heads}; expected num_key_value_heads or num_attention_heads, "
                f"{narrow} or {heads}"
            )
        if self.keep_window_size < 1:
            raise ValueError(f"keep_window_size is {self.keep_window_size}; expected at least 1")
        if not 0 <= self.dynamic_mask_ratio < 1:
            raise ValueError(f"dynamic_mask_ratio is {self.dynamic_mask_ratio}; expected 0 to 1, and less than 1")
        if self.expert_routing not in ROUTINGS:
            raise ValueError(f"expert_routing is {self.expert_routing!r}; expected one of {', '.join(ROUTINGS)}")
        if self.is_moe:
            self._check_experts()
        else:
            self.router_aux_loss_coef = 0.0  # trainers of others' take any other number for a router's presence

    def _check_experts(self) -> None:
        _check_multiple("num_experts_per_tok", self.num_experts_per_tok, "num_expert_heads", self.num_expert_heads)
        if self.expert_keys**2 != self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}; expected a square number")
        if not 1 <= self.experts_per_head <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to {self.num_experts}")
        if self.expert_routing != "product_keys" and self.num_expert_heads != 1:
            raise ValueError(f"num_expert_heads is {self.num_expert_heads}; a gate has 1, product_keys may have more")
        if self.expert_routing == "product_keys" and self.expert_retrieval_size % 2:
            raise ValueError(f"expert_retrieval_size is {self.expert_retrieval_size}; expected an even number")

    @property
    def head_size(self) -> int:
        """d, the size of one attention head."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """K, by default as many as query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def bias_heads(self) -> int:
        """Hm, rows of the bias."""
        return self.num_bias_heads or self.key_value_heads

    @property
    def longest_sequence(self) -> int:
        """The tokens of the longest sequence that the model's RoPE allows."""
        length, rope = self.max_position_embeddings, self.rope
        return int(length * rope["factor"]) if rope["rope_type"] == "dynamic" else length

    @property
    def selects_keys(self) -> bool:
        """Whether a sequence can be so long that keys are left out by their biases."""
        return self.keep_window_size < self.longest_sequence or self.dynamic_mask_ratio > 0

    @property
    def experts_per_head(self) -> int:
        """k, the experts that one head of the router chooses for a token."""
        return self.num_experts_per_tok // self.num_expert_heads

    @property
    def expert_keys(self) -> int:
        """n = sqrt(E), the length of each of the router's two score lists."""
        return math.isqrt(self.num_experts)

    @property
    def rope(self) -> dict[str, Any]:
        """RoPE's type and parameters, which transformers fills in from any of their older spellings."""
        return {**(self.rope_parameters or {})}

    @property
    def beyond_transformers(self) -> list[str]:
        """The fields, with their values, that `transformers`' own Doge could not follow."""
        fields = {
            "num_bias_heads": self.bias_heads != self.key_value_heads,
            "query_key_norm": not self.query_key_norm,
            "dynamic_mask_ratio": self.dynamic_mask_ratio > 0,
            "expert_routing": self.is_moe and self.expert_routing != "batch",
        }
        return [f"{name}={getattr(self, name)!r}" for name, beyond in fields.items() if beyond]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The JSON object of a config file; transformers' `doge` is read as one of this class."""
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == transformers.DogeConfig.model_type:
            values = {**values, "model_type": cls.model_type}
        return values, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DogeConfig":
        """A config from its JSON object; see `expert_routing` for what a missing routing means."""
        return super().from_dict({"expert_routing": "batch", **config_dict}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, of `transformers`' model type where that can express it."""
        values = super().to_dict()
        if type(self) is DogeConfig and not self.beyond_transformers:
            values["model_type"] = transformers.DogeConfig.model_type
        return self._without_router(values)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and always the routing, whose absence means something else."""
        return self._without_router({**super().to_diff_dict(), "expert_routing": self.expert_routing})

    def _without_router(self, values: dict[str, Any]) -> dict[str, Any]:
        """Without the loss of a router where there is none: experts that join the model have the default."""
        return {name: value for name, value in values.items() if self.is_moe or name != "router_aux_loss_coef"}


@strict
class CheemsConfig(DogeConfig):
    """Hyper-parameters of a Cheems model: those of Doge, and which of its layers are attention.

    Layer i is attention where `i % attn_layer_period == attn_layer_offset`. The others hold `sequence_mixer`, a name
    in `MIXERS`: "ssd", in chunks of `ssd_chunk_size` tokens, or what a program has registered. A period
    that leaves no layer of attention or none of the other is allowed; the log says so.
    Attention has a row of biases for each query head, no norms of queries and keys, and no keep window, unless told.
    """

    model_type = "cheems"
    base_model_tp_plan = None

    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2
    query_key_norm: bool = False
    keep_window_size: int = EVERY_KEY
    attn_layer_period: int = 8
    attn_layer_offset: int = 7
    ssd_chunk_size: int = 64
    sequence_mixer: str = "ssd"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("attn_layer_period", "ssd_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.attn_layer_offset < self.attn_layer_period:
            raise ValueError(
                f"attn_layer_offset is {self.attn_layer_offset}; expected 0 to attn_layer_period - 1, "
                f"{self.attn_layer_period - 1}"
            )
        if self.sequence_mixer not in MIXERS:
            raise ValueError(f"sequence_mixer is {self.sequence_mixer!r}; expected one of {', '.join(MIXERS)}")
        if self.num_bias_heads is None:
            self.num_bias_heads = self.num_attention_heads
        if self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window}; Cheems has none, so expected None")
        super().__post_init__(**kwargs)

    @property
    def number_of_conv_states(self) -> int:
        """The tensors in a mixer's state, in transformers' words: its caches read it."""
        return len(MIXERS[self.sequence_mixer].cache_type._fields)

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
