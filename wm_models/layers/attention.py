"""Dynamic mask attention (paper, section 3.2): each key carries a bias computed from its own value vector.

B batch, S new tokens, L keys seen, C cache capacity, D hidden size, H query heads, K key/value heads, d head size,
Hm rows of the bias (K or H), w keys kept, n digits of a bias.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from wm_models.configuration import DogeConfig
from wm_models.layers.context import Context, LayerCache


class AttentionCache(NamedTuple):
    """One attention layer's static cache. Row j of a slot is the token at position j."""

    key: torch.Tensor  # (B, K, C, d), rotated
    value: torch.Tensor  # (B, K, C, d)
    bias: torch.Tensor  # (B, Hm, C, n): four dimensions because TensorRT's cache update takes no other rank


class KeyBias(nn.Module):
    """The keys' biases, exp(A · softplus(dt)). `selects`: whether keys are left out by them."""

    def __init__(self, selects: bool):
        super().__init__()
        self.selects = selects

    def forward(self, dt: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """dt (B, S, Hm), A (Hm) -> (B, Hm, S): computed in dt's dtype, rounded to A's, or to float32 to select by."""
        dtype = torch.promote_types(A.dtype, torch.float32) if self.selects else A.dtype
        return torch.exp(A.to(dt.dtype) * F.softplus(dt)).to(dtype).transpose(1, 2)


def bias_digits(selects: bool, dtype: torch.dtype) -> int:
    """n, the numbers of a cache's `dtype` that a bias is kept in.

    Biases that decide which keys are kept must not be rounded to a narrow dtype: near 1, where most are, hundreds of
    them would become equal in bfloat16, and equals are ordered by their positions. Three digits hold a float32.
    """
    return 3 if selects and dtype.itemsize < 4 else 1


def split_bias(bias: torch.Tensor, digits: int, dtype: torch.dtype) -> torch.Tensor:
    """bias (…) -> (…, n), n = `digits` numbers of `dtype` whose sum it is, the largest first; one is the bias itself.

    Each of several is made of the next bits of a float32, since a compiler takes two casts, down and up, for none. The
    gradient comes by the first digit: where their sum is what is read, each has the same one.
    """
    if digits == 1:
        return bias[..., None]
    hidden = 23 + round(math.log2(torch.finfo(dtype).eps))  # bits of a float32 that `dtype` has no room for
    found, rest = [], bias.detach()
    for _ in range(digits - 1):
        found.append((rest.view(torch.int32) & -(1 << hidden)).view(torch.float32))
        rest = rest - found[-1]
    first = bias + (found[0] - bias).detach()
    return torch.stack([first, *found[1:], rest], dim=-1).to(dtype)


def join_bias(digits: torch.Tensor) -> torch.Tensor:
    """(…, n) -> (…, 1): what `split_bias` was given. The sum of several is exact in float32, in any order."""
    return digits if digits.shape[-1] == 1 else digits.float().sum(-1, keepdim=True)


def compose(first: nn.Linear, second: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the linear layer that is `second` after `first`, in float64."""
    weight = second.weight.double() @ first.weight.double()
    if second.bias is None:
        return weight, None
    return weight, second.bias.double() + second.weight.double() @ first.bias.double()


class DMAttention(nn.Module):
    """One attention layer: (B, S, D) -> (B, S, D); positions and caches are the context's."""

    def __init__(self, config: DogeConfig, layer: int):
        super().__init__()
        self.layer, self.head_size, self.key_value_heads = layer, config.head_size, config.key_value_heads
        self.scale = config.head_size**-0.5  # of the products of query and key
        inner, narrow = config.num_attention_heads * config.head_size, config.key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.attention_bias)
        self.A = nn.Parameter(torch.zeros(config.bias_heads))
        self.key_bias, self.selects = KeyBias(config.selects_keys), config.selects_keys
        self.dt_proj = nn.Linear(narrow, config.bias_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_size, eps=config.rms_norm_eps) if config.query_key_norm else nn.Identity()
            for _ in range(2)
        )

    def start_values(self) -> dict[str, torch.Tensor]:
        """With A = 0 every bias is 1, which the softmax cancels: training starts with plain attention."""
        return {"A": torch.zeros_like(self.A)}

    def new_cache(self, batch: int, capacity: int) -> AttentionCache:
        """An empty static cache: `batch` slots of `capacity` tokens, in the weights' dtype and on their device."""
        like, heads = self.cached_like, (self.key_value_heads, self.head_size)
        sizes = heads, heads, (self.A.shape[0], bias_digits(self.selects, like.dtype))
        return AttentionCache(*(like.new_zeros(batch, heads, capacity, size) for heads, size in sizes))

    @property
    def cached_like(self) -> torch.Tensor:
        """A tensor of the caches' dtype, on their device."""
        return self.A

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query (B, H, S, d), key and value (B, K, S, d), and the bias's dt (B, S, Hm), see `project_dt`."""
        value = self.v_proj(x)
        query, key = self.heads(self.q_proj(x)), self.heads(self.k_proj(x))
        return query, key, self.heads(value), self.project_dt(x, value)

    def project_dt(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """dt (B, S, Hm), from the layer's input x (B, S, D) or from its values (B, S, K·d), which are linear in x.

        Where keys are selected by their biases, equal tokens must have equal biases in the first layer, or which of
        them is kept would depend on the last bit, and that on how many rows a product has. So there dt and the bias
        are computed in float64, from x: once rounded to the model's dtype they are equal but for one pair in about
        2^29. Deeper layers need no more: there equal tokens have unequal inputs. The exception is a run of one token at
        the beginning of a sequence, whose keys are equal up to rounding in every layer.

        An adapter or another layer in the place of a projection is applied as it is, to the values; then equal tokens
        may differ in the last bit.
        """
        if not self.selects:
            return self.dt_proj(value)
        if type(self.v_proj) is not nn.Linear or type(self.dt_proj) is not nn.Linear:
            return self.dt_proj(value).double()
        return F.linear(x.double(), *compose(self.v_proj, self.dt_proj))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, heads·d) -> (B, heads, S, d)."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        query, key, value, dt = self.project(x)
        query, key = context.rotate(self.q_norm(query)), context.rotate(self.k_norm(key))
        bias = self.key_bias(dt, self.A)
        y = context.attend(self.layer, query, key, value, bias, self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def cache_rows(caches: Sequence[LayerCache]) -> int | None:
    """C, the rows of the attention layers' caches; None where no layer has attention."""
    return next((cache.key.shape[2] for cache in caches if isinstance(cache, AttentionCache)), None)


def pack_keys(
    key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, digits: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the bias into the key vectors: `score + bias` is then one plain dot product.

    Keys become [key, bias_1 … bias_G] with G = Hm / K and n = `digits` channels for each bias row of a key head. Values
    get as many zeros, since fused kernels want both of one size. key and value (B, K, L, d), bias (B, Hm, L) ->
    (B, K, L, d + G n).
    """
    batch, heads, length, _ = key.shape
    groups = bias.shape[1] // heads
    rows = bias.view(batch, heads, groups, length).transpose(2, 3)
    channels = split_bias(rows, digits, key.dtype).flatten(3)
    return torch.cat([key, channels], dim=-1), F.pad(value, (0, channels.shape[-1]))


def document_index(position_ids: torch.Tensor) -> torch.Tensor:
    """Which document of its row each token is in: a new one starts where a position does not follow the one before.

    position_ids (B, S) int64, as transformers reads them -> (B, S) int64, rising from 0.
    """
    starts = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    return starts.cumsum(-1)


def document_channels(documents: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels for queries and for keys that keep the documents of a row apart under causal attention, without a mask.

    Their product, scaled, adds nothing within a document and -128 or less to a key of an earlier one, whose softmax
    weight is then exactly zero. It is a difference of two indices: put first in the vectors it is summed, and is back
    at zero, before the real channels begin, so it costs them no precision. Each index is two digits, so every number
    is exact in float32, bfloat16 and float16.

    documents (B, S) int64 -> query's and key's (B, 1, S, 4), for products that are multiplied by `scale`.
    """
    unit = 2.0 ** math.ceil(math.log2(128 / scale) / 2)
    digits = torch.stack([documents // 256, documents % 256], dim=-1).to(dtype)[:, None] * unit
    places = (torch.tensor([256.0, 1.0], dtype=dtype, device=documents.device) * unit).expand_as(digits)
    return torch.cat([places, -digits], dim=-1), torch.cat([digits, places], dim=-1)


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None = None,
    digits: int = 1,
) -> torch.Tensor:
    """Attention over packed keys: query (B, H, S, d), key and value (B, K, L, d + G n) -> (B, H, S, d).

    `scale` multiplies the products of query and key, and not the bias. `mask`, bool or additive, broadcasts to
    (B, H, S, L). Without one query i sees keys 0 … i, and of these only its own document's where `documents` (B, S)
    says which is whose. No S×L tensor is made here, and the bias's gradient flows through the keys.
    """
    heads, size = query.shape[1], query.shape[-1]
    groups = (key.shape[-1] - size) // digits
    # head h reads the channels of bias h % G of its key head
    channel = torch.eye(groups, dtype=query.dtype, device=query.device).repeat_interleave(digits, 1) / scale
    channel = channel.repeat(heads // groups, 1)[None, :, None].expand(query.shape[0], -1, query.shape[2], -1)
    query = torch.cat([query, channel], dim=-1)
    if documents is not None:
        query_side, key_side = document_channels(documents, scale, query.dtype)
        query = torch.cat([query_side.expand(*query.shape[:2], -1, -1), query], dim=-1)
        key = torch.cat([key_side.expand(*key.shape[:2], -1, -1), key], dim=-1)
        value = F.pad(value, (0, key_side.shape[-1]))
    if key.shape[1] != heads and query.device.type == "cpu" and torch.is_grad_enabled():
        # Inductor (PyTorch 2.13) gives wrong gradients of grouped heads where a checkpoint computes them again
        key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != heads,
    )[..., :size]


def keep_largest(bias: torch.Tensor, visible: torch.Tensor, keep: int) -> torch.Tensor:
    """The additive mask that leaves each query the `keep` visible keys with the largest biases: (B, Hm, S, L).

    bias (B, Hm, 1, L), visible (B, 1, S, L) bool. A key that is kept has its bias there, every other one the dtype's
    lowest number. Of equal biases the later key goes first, so where all are equal (A = 0, as training starts) what is
    kept is a sliding window. Top-k is asked only for the keep-th largest value, and ties with it are counted, so the
    choice does not depend on how a machine sorts. With L <= keep every visible key is kept.
    """
    lowest = torch.finfo(bias.dtype).min
    ranked = torch.where(visible, bias, lowest)
    length = visible.shape[-1]
    if statically_known_true(length <= 2 * keep):  # where few are left out, those are fewer to look for
        count: int = torch.sym_max(length - keep, 0) + 1  # type: ignore[assignment]
        last = ranked.topk(count, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    else:
        count = torch.sym_min(keep, length)  # type: ignore[assignment]
        last = ranked.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    tied = ranked == last
    too_many = (ranked >= last).sum(-1, keepdim=True, dtype=torch.int32) - keep
    early = tied & (tied.cumsum(-1, dtype=torch.int32) <= too_many)
    return torch.where((ranked < last) | early, lowest, ranked)


def narrowed(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask in `dtype`, which may be narrower; its lowest number becomes the lowest of `dtype`."""
    return mask if mask.dtype == dtype else mask.clamp(min=torch.finfo(dtype).min).to(dtype)


def drop_smallest(
    bias: torch.Tensor, visible: torch.Tensor, lengths: torch.Tensor, ratio: float, dtype: torch.dtype
) -> torch.Tensor:
    """The mask of models that drop a share of all keys (2025-01): additive, (B, Hm, S, L), in `dtype`.

    bias (B, Hm, 1, L), visible (B, 1, S, L) bool, lengths (B) int64, each sequence's keys. With n = int(length · ratio)
    > 0, keys whose bias is below the n-th smallest of all the sequence's keys are dropped, the same for every query.
    A query with no visible key left attends to all that are only dropped or only hidden alike, as those models were
    trained, so there are two steps down: one for either, both for a key that is dropped and hidden.
    """
    low = torch.finfo(dtype).min / 2
    present = torch.arange(bias.shape[-1], device=bias.device) < lengths[:, None, None, None]
    count = (lengths.double() * ratio).long()[:, None, None, None].expand(-1, bias.shape[1], -1, -1)
    ranked = torch.where(present, bias, torch.inf).sort(dim=-1).values
    last = ranked.gather(-1, (count - 1).clamp(min=0))
    stays = present & ((bias >= last) | (count == 0))
    zero = bias.new_zeros((), dtype=dtype)
    return torch.where(stays, zero, low) + torch.where(visible, zero, low)
