"""The two contexts that a model runs in: transformers' own caches and masks, and a step over static caches.

B batch (slots), S new tokens, L keys seen, C cache capacity, D hidden size, H query heads, K key/value heads,
d head size, Hm rows of the bias, w keys kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import BaseQuantizedLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

from wm_models.configuration import DogeConfig
from wm_models.layers.attention import (
    AttentionCache,
    attend_packed,
    bias_digits,
    cache_rows,
    drop_smallest,
    join_bias,
    keep_largest,
    narrowed,
    pack_keys,
    split_bias,
)
from wm_models.layers.context import Advance, LayerCache, State
from wm_models.layers.rotary import RotaryEmbedding, rotate
from wm_models.layers.selection import attend_blocks, block_size

# transformers' models take the cache under its earlier name for as long; so do these.
earlier_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


def past_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens in the cache; the int 0 exactly when it is known to be empty without looking at data."""
    return 0 if cache is None else cache.get_seq_length()


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing can be in the cache yet. A static cache in use answers with a tensor, hence no."""
    length = past_length(cache)
    return isinstance(length, int) and length == 0


def real_tokens(attention_mask: torch.Tensor | None, length: int, past: int | torch.Tensor) -> torch.Tensor | None:
    """Which of the S = `length` new tokens are no padding: bool (B, 1, S), or None where all are real."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, None, -length:].bool()
    # in a mask (B, 1, S, L) a token that cannot see itself, in column past + s, is padding
    columns = past + torch.arange(length, device=attention_mask.device)
    own = attention_mask.gather(3, columns[:, None].expand(*attention_mask.shape[:3], 1))[..., 0]
    return own if own.dtype == torch.bool else own == 0


def visible_keys(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """The mask as transformers builds it, bool (B, 1, S, L)."""
    windowed = getattr(config, "sliding_window", None) is not None
    create = create_sliding_window_causal_mask if windowed else create_causal_mask
    mask = create(config, inputs_embeds, attention_mask, cache, position_ids, allow_is_causal_skip=False)
    assert mask is None or isinstance(mask, torch.Tensor)
    return mask


class CacheContext:
    """Training, prefill and `generate`: transformers' cache or none, and its masks.

    The cache holds packed keys, so a key's bias is computed once and kept beside it. Where the cache is empty there is
    no S×L mask. A sequence that fits the keep window has padding written into the biases of the padded keys, and
    documents packed into one row are kept apart by channels of their index. A longer one is taken in blocks.

    Three cases need the mask. A cache in use has its keys where they are. With a sliding window a key that was not
    among the w largest may be so later, when larger ones have left the window, so w + b candidates a block are not
    enough. A dropped share of keys leaves a number of keys that grows with the sequence, and a query that sees none of
    them attends to later keys.
    """

    def __init__(
        self,
        config: DogeConfig,
        rotation: tuple[torch.Tensor, torch.Tensor],
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        documents: torch.Tensor | None = None,
    ):
        self.rotation, self.cache, self.keep = rotation, cache, config.keep_window_size
        self.empty, self.ratio, self.selects = is_empty(cache), config.dynamic_mask_ratio, config.selects_keys
        self.shape = batch, length = inputs_embeds.shape[:2]
        self.lengths = torch.full((batch,), length, device=inputs_embeds.device) + past_length(cache)
        fits = length <= min(self.keep, config.sliding_window or self.keep) and not self.ratio
        self.in_blocks = False
        self.padding: torch.Tensor | None = None
        self.documents: torch.Tensor | None = None
        self.visible: torch.Tensor | None = None
        if attention_mask is not None and attention_mask.ndim == 4:
            self.visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        elif self.empty and fits:
            self.padding = None if attention_mask is None else attention_mask[:, None].bool()
            self.documents = documents
        elif self.empty and config.sliding_window is None and not self.ratio:
            self.in_blocks = True
            self.documents = documents if attention_mask is None else attention_mask.long() - 1
        else:
            self.visible = visible_keys(config, inputs_embeds, attention_mask, cache, position_ids)
        self.kinds = getattr(config, "layer_types", ())
        self.real = real_tokens(attention_mask, length, past_length(cache)) if self.kinds else None
        first = (position_ids == 0)[:, None]
        self.first = first if self.real is None else first & self.real

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x, *self.rotation)

    def carry(self, layer: int, kind: Callable[..., State], advance: Advance[State]) -> torch.Tensor:
        state = None
        if self.cache is not None:
            # tensors of zeros or None where the cache is empty, whatever it says of a previous state
            stored = tuple(self.cache.layers[layer].recurrent_states.values())  # type: ignore[union-attr]
            state = None if any(tensor is None for tensor in stored) else kind(*stored)
        y, new = advance(state=state, real=self.real, first=self.first)
        if self.cache is not None:
            for index, tensor in enumerate(new):
                self.cache.update_recurrent_state(tensor, layer, index)
            if self.kinds[layer] == "hybrid":
                count = y.new_zeros(*self.shape, 1)[:, None]
                self.cache.update(count, count, layer)
        return y

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if self.padding is not None:
            # low enough that the softmax gives zero, high enough that it is still finite when divided by the scale
            lowest = torch.finfo(key.dtype).min * scale / 2
            bias = torch.where(self.padding, bias, lowest)
        digits = bias_digits(self.selects, key.dtype)
        if self.cache is not None:
            check_cache(self.cache, layer, query.shape[-1], bias.shape[1] // key.shape[1] * digits)
        if self.in_blocks:
            if self.cache is not None:
                self.cache.update(*pack_keys(key, value, bias, digits), layer)
            block = block_size(self.keep)
            return attend_blocks(query, key, value, bias, scale, self.keep, block, self.documents)
        packed_key, packed_value = pack_keys(key, value, bias, digits)
        if self.cache is not None:
            remembered = self.cache.update(packed_key, packed_value, layer)
            if not self.empty or self.visible is not None:
                packed_key, packed_value = remembered
        mask = self.visible
        if mask is not None:
            biases = unpack_bias(packed_key, query.shape[-1], digits)[:, :, None]
            if packed_key.shape[2] > self.keep:
                mask = keep_largest(biases, mask, self.keep) > torch.finfo(biases.dtype).min
            if self.ratio:
                mask = drop_smallest(biases, mask, self.lengths, self.ratio, query.dtype)
            if mask.shape[1] != 1:
                mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
        return attend_packed(query, packed_key, packed_value, scale, mask, self.documents, digits)


def check_cache(cache: Cache, layer: int, size: int, channels: int) -> None:
    """Raise ValueError for a cache that cannot keep packed keys: `channels` numbers beside each key of `size`."""
    kept = cache.layers[layer] if layer < len(cache.layers) else None  # a dynamic cache gets them one by one
    if isinstance(kept, BaseQuantizedLayer):
        raise ValueError("the cache is quantised; a key's bias, kept beside it, must stay exact: take another cache")
    keys: torch.Tensor | None = getattr(kept, "keys", None)
    if keys is not None and keys.ndim == 4 and keys.shape[-1] != size + channels:
        raise ValueError(
            f"the cache has keys of {keys.shape[-1]} numbers; expected {size + channels}, for each key has its bias "
            f"beside it: give early_initialization head_dim={size + channels}, or leave the cache empty; for prefix "
            "tuning take prompt tuning or LoRA, for an exportable module wm-export"
        )


def unpack_bias(packed_key: torch.Tensor, size: int, digits: int) -> torch.Tensor:
    """The biases (B, Hm, L) out of packed keys (B, K, L, d + G n), n = `digits`."""
    return join_bias(packed_key[..., size:].unflatten(-1, (-1, digits)))[..., 0].transpose(2, 3).flatten(1, 2)


class StepContext:
    """A chunk of new tokens for each slot of static caches, which are written in place.

    Tokens are placed at each slot's own `cache_lengths`. Row j is visible to new token s when
    j <= cache_lengths + s: rows beyond a slot's length are never seen, so padded tokens may leave anything there.

    A key that is not among the w with the largest biases is not among them later either. So whoever owns the caches may
    take such rows out and move the others together, in their order; `dropped_lengths` then says how many positions
    went before the first row. With a sliding window or a dropped share of keys, which rows go on mattering is another
    question, and none may be taken out.
    """

    def __init__(
        self,
        config: DogeConfig,
        rotary: RotaryEmbedding,
        length: int,
        cache_lengths: torch.Tensor,
        sequence_lengths: torch.Tensor,
        caches: Sequence[LayerCache],
        dropped_lengths: torch.Tensor | None = None,
    ):
        self.caches, self.keep, self.ratio = caches, config.keep_window_size, config.dynamic_mask_ratio
        self.lengths = cache_lengths + sequence_lengths
        self.written: list[LayerCache] = []
        self.hidden: torch.Tensor | None = None
        steps = torch.arange(length, device=cache_lengths.device)
        places = positions = cache_lengths[:, None] + steps  # (B, S): rows of the caches, and positions in the sequence
        if dropped_lengths is not None:
            positions = places + dropped_lengths[:, None]
            self.rotation = rotary(positions, self.lengths + dropped_lengths)
        else:
            self.rotation = rotary(positions, self.lengths)
        self.real = (steps < sequence_lengths[:, None])[:, None]  # (B, 1, S)
        self.first = (positions == 0)[:, None] & self.real
        # without an attention layer nothing of what follows is read
        capacity = cache_rows(caches) or length
        # A slot that is full takes no more tokens, so what an idle step writes over its end is never read.
        self.start = cache_lengths.clamp(max=capacity - length)
        rows = torch.arange(capacity, device=cache_lengths.device)
        self.visible = rows <= places[:, None, :, None]  # (B, 1, S, C)
        if config.sliding_window is not None:
            self.visible = self.visible & (rows > places[:, None, :, None] - config.sliding_window)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x, *self.rotation)

    def carry(self, layer: int, kind: Callable[..., State], advance: Advance[State]) -> torch.Tensor:
        old = self.caches[layer]
        y, new = advance(state=kind(*old), real=self.real, first=self.first)
        self.written.append(kind(*(self.replace(*pair) for pair in zip(old, new, strict=True))))
        return y

    def replace(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Put `new` in the place of all that is in `cache`."""
        return cache.copy_(new)

    def split(self, bias: torch.Tensor, digits: int, dtype: torch.dtype) -> torch.Tensor:
        """The bias (B, Hm, S) as a bias cache keeps it, (B, Hm, S, n); see `split_bias`."""
        return split_bias(bias, digits, dtype)

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Put `new` (B, heads, S, size) into `cache` (B, heads, C, size) at each slot's start."""
        rows = self.start[:, None] + torch.arange(new.shape[2], device=new.device)
        return cache.scatter_(2, rows[:, None, :, None].expand_as(new), new)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        old = self.caches[layer]
        assert isinstance(old, AttentionCache)
        new = key, value, self.split(bias, old.bias.shape[-1], key.dtype)
        cache = AttentionCache(*(self.write(*pair) for pair in zip(old, new, strict=True)))
        self.written.append(cache)
        biases = join_bias(cache.bias).transpose(2, 3)  # (B, Hm, 1, C)
        lowest = torch.finfo(biases.dtype).min
        # a capacity that is dynamic in an export may pass the window unless its bound says otherwise
        fits = statically_known_true(biases.shape[3] <= self.keep)
        kept = None if fits else keep_largest(biases, self.visible, self.keep)
        if self.ratio:
            visible = self.visible if kept is None else kept > lowest
            dropped = drop_smallest(biases, visible, self.lengths, self.ratio, query.dtype)
            mask = narrowed(biases, query.dtype) + dropped  # (B, Hm, S, C)
        elif kept is None:
            if self.hidden is None:  # once for all layers
                self.hidden = torch.where(self.visible, query.new_zeros(()), torch.finfo(query.dtype).min)
            mask = narrowed(biases, query.dtype) + self.hidden
        else:
            mask = narrowed(kept, query.dtype)
        groups = query.shape[1] // mask.shape[1]
        if groups > 1:
            mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
        return self.attend_masked(query, cache.key, cache.value, mask, scale)

    def attend_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention with an additive mask: query (B, H, S, d), key and value (B, K, C, d), mask (B, H, S, C).

        `scale` multiplies the products of query and key, and not the mask.
        """
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
