"""What the models have in common: residual layers of a sequence mixer and a feed-forward, embedding, norm and head.

A model's own file says which mixer its layers hold.

B batch, S new tokens, L keys seen, C cache capacity, D hidden size, V vocabulary, h router heads,
n length of a router's score list.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from wm_models.checkpoint.loader import field_options, find_checkpoint
from wm_models.configuration import DogeConfig
from wm_models.context import CacheContext, StepContext, earlier_cache_name, is_empty, past_length, visible_keys
from wm_models.layers.attention import document_index
from wm_models.layers.context import Context, LayerCache
from wm_models.layers.experts import feed_forward
from wm_models.layers.mixers import Mixer
from wm_models.layers.rotary import RotaryEmbedding
from wm_models.losses import count_predictions, load_balancing_loss, next_token_loss

log = logging.getLogger(__name__)


class DecoderLayer(GradientCheckpointingLayer):
    """`r₁·x + mixer(norm(x))`, then `r₂·x + feed_forward(norm(x))`: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = feed_forward(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def start_values(self) -> dict[str, torch.Tensor]:
        """Residuals of factor one."""
        return {name: torch.ones_like(getattr(self, name)) for name in ("input_residual", "post_attention_residual")}

    @property
    def mixer(self) -> Mixer:
        """The sequence mixer, which a subclass keeps under its checkpoint's name."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output, and its router's scores (B, S, h, 2, n) where it has experts."""
        y = self.mixer(self.input_layernorm(x), context)
        x = self.input_residual * x + F.dropout(y, self.dropout, self.training)
        y, scores = self.mlp(self.post_attention_layernorm(x))
        return self.post_attention_residual * x + F.dropout(y, self.dropout, self.training), scores


class DecoderPreTrainedModel(PreTrainedModel):
    config: DogeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint directory, or a model of the Hugging Face hub, whole or not at all.

        `source` may also be a `CheckpointFolder`, which is opened already.
        Takes what `transformers.PreTrainedModel.from_pretrained` takes, and every format of `checkpoint.formats`,
        recognised by its tensors. An MLP checkpoint loads as a mixture of experts with the options `is_moe=True`,
        `num_experts` and `num_experts_per_tok`: the experts then start with nothing to add. Raises `CheckpointError`,
        naming every tensor that is missing, unexpected or of the wrong shape, where the checkpoint is of none.
        """
        if source is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(source, *args, **kwargs)
        began, checkpoint = time.monotonic(), find_checkpoint(cls, source, kwargs)
        for name in field_options(cls, kwargs):
            del kwargs[name]
        kwargs["config"], folder = checkpoint.config, checkpoint.folder
        has_generation = folder.has(GENERATION_CONFIG_NAME)
        offloads = kwargs.get("device_map") is not None  # to the disk too, and then reads weights by name when they run
        with nullcontext(str(folder.path)) if offloads else folder.view() as path:
            if checkpoint.is_plain:
                loaded = super().from_pretrained(path, *args, **kwargs)
            else:
                loaded = super().from_pretrained(None, *args, state_dict=checkpoint.state(), **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            if has_generation and not checkpoint.is_plain:
                model.generation_config = GenerationConfig.from_pretrained(path)
        folder.check_unchanged()
        model.name_or_path = model.config.name_or_path = checkpoint.config.name_or_path = str(folder.path)
        log.info("loaded %s from %s in %.1f s", cls.__name__, folder.path, time.monotonic() - began)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' start values, then a module's own: what its `start_values()` gives, by the name of each of its
        parameters and buffers, is where training starts, unless a checkpoint has the tensor."""
        super()._init_weights(module)
        start_values: Callable[[], dict[str, torch.Tensor]] | None = getattr(module, "start_values", None)
        if start_values is not None:
            for name, value in start_values().items():
                init.copy_(getattr(module, name), value)


class DecoderModel(DecoderPreTrainedModel):
    """Token ids to hidden states."""

    layer_class: ClassVar[type[Any]]  # of (config, layer's number), a DecoderLayer

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([self.layer_class(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def run(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Every layer and the final norm: (B, S, D) -> (B, S, D), then each layer's input, and its router's scores."""
        inputs, routers = [], []
        for layer in self.layers[: self.config.num_hidden_layers]:  # `assistant_early_exit` lowers the number
            inputs.append(x)
            x, scores = layer(x, context)
            routers.append(scores)
        return self.norm(x), inputs, routers

    @earlier_cache_name
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast:
        """As in transformers: input_ids (B, S) int64 or inputs_embeds (B, S, D); attention_mask (B, L) of ones and
        zeros, or bool (B, 1, S, L); position_ids (B, S) int64; a cache, new or in use. Without mask and cache, a
        position that does not follow the one before it begins another document, which sees nothing of the earlier.
        Raises ValueError for `output_attentions`, and in training for a nonzero `attention_dropout`."""
        if output_attentions:
            raise ValueError("output_attentions is set; the fused attention keeps no weights, so leave it out")
        if self.training and self.config.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.config.attention_dropout}; attention is trained without dropout, so set "
                "it to 0.0; hidden_dropout drops from what each layer adds"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, not both and not neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        documents = None
        if position_ids is None:
            steps = torch.arange(x.shape[1], device=x.device)
            position_ids = (steps + past_length(cache))[None]
        elif attention_mask is None and cache is None:
            documents = document_index(position_ids)
        rotation = self.rotary_emb(position_ids, position_ids.amax(-1) + 1)
        context = CacheContext(self.config, rotation, x, attention_mask, position_ids, cache, documents)
        last, inputs, routers = self.run(x, context)
        return MoeModelOutputWithPast(
            last_hidden_state=last,
            cache=cache,
            hidden_states=(*inputs, last) if output_hidden_states else None,
            router_logits=tuple(routers) if output_router_logits and self.config.is_moe else None,  # type: ignore[arg-type]
        )

    def step(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        sequence_lengths: torch.Tensor,
        caches: Sequence[LayerCache],
        dropped_lengths: torch.Tensor | None = None,
        context_type: type[StepContext] = StepContext,
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """As `DecoderWithHead.step`, but returns the hidden states (B, S, D) and the caches."""
        lengths = cache_lengths, sequence_lengths
        context = context_type(self.config, self.rotary_emb, input_ids.shape[1], *lengths, caches, dropped_lengths)
        return self.run(self.embed_tokens(input_ids), context)[0], context.written


class DecoderWithHead(DecoderPreTrainedModel):
    """What a language model and a classifier have in common: a base model, a head, and a step over static caches."""

    model: DecoderModel

    @property
    def head(self) -> nn.Linear:
        """Hidden states to logits, which a subclass keeps under its checkpoint's name."""
        raise NotImplementedError

    def new_caches(self, batch: int, capacity: int) -> list[LayerCache]:
        """Empty static caches for `step`, one a layer: `batch` slots of `capacity` tokens, on the model's device."""
        layers: Any = self.model.layers
        return [layer.mixer.new_cache(batch, capacity) for layer in layers]

    def step(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        sequence_lengths: torch.Tensor,
        caches: Sequence[LayerCache],
        dropped_lengths: torch.Tensor | None = None,
        *,
        all_logits: bool = False,
        logits_index: torch.Tensor | None = None,
        context_type: type[StepContext] = StepContext,
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """One chunk of tokens for every slot of static caches: the function that is compiled and exported.

        input_ids (B, S) int64, right-padded; cache_lengths (B) int64, the tokens each slot already holds;
        sequence_lengths (B) int64, each slot's real new tokens (0: the slot is idle and keeps its content).
        cache_lengths + sequence_lengths must not pass the capacity C, and a slot that is not full needs
        cache_lengths + S <= C. dropped_lengths (B) int64: the tokens that each slot held once and whose rows were
        evicted since, see `StepContext`; cache_lengths does not count them. Returns logits (B, 1, V) of each slot's
        last real token; (B, R, V) with `logits_index` (B, R) int64, of those of the S tokens; or (B, S, V) with
        `all_logits`. V is a classifier's number of labels. Returns the caches too, which `StepContext` writes in place.
        """
        lengths = cache_lengths, sequence_lengths
        hidden, caches = self.model.step(input_ids, *lengths, caches, dropped_lengths, context_type)
        if not all_logits:
            rows = (sequence_lengths - 1).clamp(min=0)[:, None] if logits_index is None else logits_index
            hidden = hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))
        return self.head(hidden), caches


class DecoderForCausalLM(DecoderWithHead, GenerationMixin):
    """The base model with its language-model head."""

    model_class: ClassVar[type[DecoderModel]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    @earlier_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Inputs as `DecoderModel.forward`; labels (B, S) int64, -100 where there is none; `logits_to_keep` the number
        of last positions (0: all), or their indices. Returns logits (B, S, V) unless `skip_logits`, by default in
        training with labels, and, with labels, the loss: the mean over their predictions, to which
        `output_router_logits` adds `router_aux_loss_coef` times the routers' load-balancing loss. Where these tokens
        are a part of a larger batch, `num_items_in_batch` is its number of predictions, and the loss is their share of
        the batch's."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden, logits, loss, aux_loss = outputs.last_hidden_state, None, None, None
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if outputs.router_logits is not None:
            aux_loss = load_balancing_loss(outputs.router_logits, self.config.experts_per_head, attention_mask)
        if labels is not None:
            loss = next_token_loss(hidden, self.lm_head.weight, labels)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
            if num_items_in_batch is not None:
                loss = loss * count_predictions(labels) / num_items_in_batch
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,  # type: ignore[arg-type]
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> Any:
        """Raise NotImplementedError: transformers' paged caches keep no biases of keys."""
        raise NotImplementedError(
            f"{type(self).__name__} has no continuous batching by generate_batch; export it, and wm-run batches"
        )

    @staticmethod
    def create_masks_for_generate(
        config: DogeConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | None:
        """The mask `generate` hands to a compiled forward: none but the padding while the cache is empty."""
        if is_empty(cache):
            return attention_mask
        return visible_keys(config, inputs_embeds, attention_mask, cache, position_ids)
