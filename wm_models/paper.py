"""The paper's parts by hand, for readers who want one without a model: the same classes that the models are made of,
under the paper's argument names. All have biases on their projections (but `queries`), and no RoPE.

B batch, S tokens, D hidden size.
"""

import torch
from torch import nn
from transformers import Cache

from wm_models.configuration import DogeConfig
from wm_models.context import CacheContext, earlier_cache_name, past_length
from wm_models.layers.attention import DMAttention
from wm_models.layers.experts import ProductKeyExperts


class UnrotatedContext(CacheContext):
    """A context without positions."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x


class DMAttn(DMAttention):
    """Dynamic mask attention (paper, section 3.2), causal, with one key/value head and one bias row a query head."""

    def __init__(self, d_model: int, n_heads: int, max_position_embeddings: int, layer_idx: int):
        self.config = DogeConfig(
            hidden_size=d_model,
            num_attention_heads=n_heads,
            max_position_embeddings=max_position_embeddings,
            keep_window_size=max_position_embeddings,
            attention_bias=True,
            query_key_norm=False,
        )
        super().__init__(self.config, layer_idx)
        nn.init.ones_(self.A)

    @earlier_cache_name
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache | None]:
        """x (B, S, D), attention_mask (B, L) of ones and zeros -> (B, S, D), and the cache that was handed in."""
        steps = torch.arange(x.shape[1], device=x.device)
        positions = (steps + past_length(cache))[None]
        mask = None if attention_mask is None else attention_mask.bool()
        context = UnrotatedContext(self.config, (x, x), x, mask, positions, cache)
        return super().forward(x, context), cache


class CDMoE(ProductKeyExperts):
    """Cross domain mixture of experts (paper, section 3.3), routed by product keys."""

    def __init__(
        self,
        d_model: int,
        act_fn: str,
        d_ff: int,
        d_private_expert_retrieval: int,
        n_experts: int,
        n_experts_heads: int,
        n_experts_per_head: int,
    ):
        config = DogeConfig(
            hidden_size=d_model,
            hidden_act=act_fn,
            intermediate_size=d_ff,
            mlp_bias=True,
            is_moe=True,
            expert_routing="product_keys",
            expert_retrieval_size=d_private_expert_retrieval,
            num_experts=n_experts,
            num_expert_heads=n_experts_heads,
            num_experts_per_tok=n_experts_heads * n_experts_per_head,
        )
        super().__init__(config)
        nn.init.normal_(self.keys, std=config.initializer_range)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x (B, S, D) -> (B, S, D)."""
        return super().forward(x)[0]
