"""Attention to the w keys of largest bias, block by block: exact, and linear in the length but for one search.

The w-th largest bias never falls as keys are added, so a key that is once not among the w largest never is again. For
the queries of a block [t, t + b) only w + b keys can matter: those kept at t, and the block's own. The keys are sorted
once, into the order of selection. Counting along it finds each block's candidates, in that order. A gather takes them,
and one attention has the blocks as its batch. A query keeps the first w of its candidates that it sees, so one number,
where it stops, says which. No S×S tensor is made.

The order of selection: the larger bias first, and of equal biases the later key.

B batch, S tokens, H query heads, K key/value heads, d head size, Hm rows of the bias (K or H), G query heads a bias
row, w keys kept, b tokens of a block, n blocks.
"""

from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from wm_models.layers.attention import bias_digits, split_bias

GROUPS = 4  # of blocks: masks and gathered keys exist for one group at a time

# The kernels of attention. Their results are saved for the backward pass: they are small, and cost the most to compute.
SAVED = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def block_size(keep: int) -> int:
    """Tokens of a block for a window of `keep` keys: sizes within twice of it cost about the same."""
    return min(512, max(32, keep // 2))


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    keep: int,
    block: int,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each query to the `keep` visible keys of largest bias: (B, H, S, d).

    query (B, H, S, d); key and value (B, K, S, d); bias (B, Hm, S), which may be wider than the keys' dtype and
    is then added in several digits, see `split_bias`; `scale` multiplies the products of query and key. A query sees
    the keys of its own document up to its own position. `documents` (B, S) int64 are rising numbers, None for one
    document; below zero a token is padding, which nothing sees and whose own result has no meaning. `block` tokens are
    taken at a time.

    The backward pass computes masks and gathered keys again, so they are not kept. Attention's results are saved.
    """
    length = query.shape[2]
    padding = -length % block
    if padding:  # keys that come after every query
        query, key, value = (F.pad(part, (0, 0, 0, padding)) for part in (query, key, value))
        bias = F.pad(bias, (0, padding))
        documents = None if documents is None else F.pad(documents, (0, padding), value=-1)
    with torch.no_grad():
        candidates = find_candidates(bias, keep, block, documents)
    packed = _pack_rows(key, value, bias, bias_digits(bias.dtype != key.dtype, key.dtype))
    contexts = partial(create_selective_checkpoint_contexts, SAVED)
    count, parts = candidates.shape[2], []
    for first in range(0, count, -(-count // GROUPS)):
        blocks = slice(first, first + -(-count // GROUPS))
        tokens = slice(blocks.start * block, blocks.stop * block)
        chosen = candidates[:, :, blocks]
        with torch.no_grad():
            seen = (~hidden_keys(chosen, first * block, block, documents)).cumsum(-1, dtype=torch.int32)
            ends = torch.searchsorted(seen, torch.full_like(seen[..., :1], keep + 1), out_int32=True)
        part = checkpoint(
            _attend, query[:, :, tokens], packed, scale, first * block, block, chosen, ends, documents,
            use_reentrant=False, preserve_rng_state=False, context_fn=contexts,
        )  # fmt: skip
        assert isinstance(part, torch.Tensor)
        parts.append(part)
    return torch.cat(parts, dim=2)[:, :, :length]


def _attend(
    query: torch.Tensor, packed: torch.Tensor, scale: float, start: int, block: int, candidates: torch.Tensor,
    ends: torch.Tensor, documents: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `attend_blocks`, for whole blocks from token `start` on: queries attend to `candidates` before `ends`."""
    heads, size = query.shape[1::2]
    batch, rows, count, few = candidates.shape
    groups, length = heads // rows, packed.shape[2]
    begins = torch.arange(batch * rows, device=query.device).view(batch, rows, 1, 1) * length
    places = candidates.clamp(max=length - 1) + begins
    taken = F.embedding(places, packed.flatten(0, 2)).flatten(0, 2).to(query.dtype)[:, None]
    taken = taken.expand(-1, groups, -1, -1)  # (B Hm n, G, w + b, 2 (d + digits))
    blocks = query.reshape(batch, rows, groups, count, block, size).transpose(2, 3).flatten(0, 2)
    digits = packed.shape[-1] // 2 - size
    blocks = F.pad(blocks, (0, digits), value=1 / scale)  # (B Hm n, G, b, d + digits)
    hidden = hidden_keys(candidates, start, block, documents)
    hidden = hidden | (torch.arange(few, device=query.device, dtype=torch.int32) >= ends)
    zero = query.new_zeros(())
    mask = torch.where(hidden, zero - torch.inf, zero).flatten(0, 2)[:, None]
    packed_key, packed_value = taken.chunk(2, dim=-1)
    y = F.scaled_dot_product_attention(blocks, packed_key, packed_value, attn_mask=mask, scale=scale)
    return y[..., :size].view(batch, rows, count, groups, block, size).transpose(2, 3).reshape(query.shape)


def _pack_rows(key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, digits: int) -> torch.Tensor:
    """Key, bias, value and zeros of each bias row side by side: (B, Hm, S, d + digits + d + digits).

    A key head serves Hm / K rows. The zeros make values as wide as keys, which fused kernels want. A key's gradient is
    a sum over blocks, so the rows are at least float32.
    """
    times = bias.shape[1] // key.shape[1]
    if times > 1:
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    channels = split_bias(bias, digits, key.dtype)
    packed = torch.cat([key, channels, value, torch.zeros_like(channels)], dim=-1)
    return packed.to(torch.promote_types(packed.dtype, torch.float32))


def find_candidates(bias: torch.Tensor, keep: int, block: int, documents: torch.Tensor | None) -> torch.Tensor:
    """The keys that each block's queries choose from, in the order of selection: int64 (B, Hm, n, w + b).

    They are the block's own, and of the keys before it the first w of its first token's document. Where there are
    fewer the rest is S, which is no key. bias (B, Hm, S); documents (B, S) or None.
    """
    rows, length = bias.shape[1:]
    starts = torch.arange(0, length, block, device=bias.device)[:, None]
    # a stable sort of the reversed keys has the later of equals first
    order = length - 1 - bias.flip(-1).argsort(dim=-1, descending=True, stable=True)
    ordered = order[:, :, None]
    before = ordered < starts  # (B, Hm, n, S)
    own = ~before & (ordered < starts + block)
    if documents is not None:
        document = documents[:, None].expand(-1, rows, -1).gather(-1, order)
        before &= document[:, :, None] == documents[:, None, ::block, None]
    taken = own | (before & (before.cumsum(-1, dtype=torch.int32) <= keep))
    wanted = torch.arange(1, keep + block + 1, device=bias.device, dtype=torch.int32)
    places = torch.searchsorted(taken.cumsum(-1, dtype=torch.int32), wanted.expand(*taken.shape[:3], -1).contiguous())
    return F.pad(order, (0, 1), value=length).gather(-1, places.flatten(2)).view(places.shape)


def hidden_keys(candidates: torch.Tensor, start: int, block: int, documents: torch.Tensor | None) -> torch.Tensor:
    """Which of its candidates a query does not see: bool (B, Hm, n, b, w + b), as it keeps none of them yet.

    candidates (B, Hm, n, w + b), as `find_candidates` gives them, of the blocks from token `start` on; documents (B, S)
    or None. A padded query sees padding of its block, or its softmax would have no value.
    """
    batch, rows, count, _ = candidates.shape
    starts = start + block * torch.arange(count, device=candidates.device)[:, None]
    places = (candidates - starts).clamp(-1, block).to(torch.int16)  # in the block, -1 before it; narrow is fast
    hidden = places[..., None, :] > torch.arange(block, device=candidates.device, dtype=torch.int16)[:, None]
    if documents is not None:
        document = F.pad(documents, (0, 1), value=-1)[:, None].expand(-1, rows, -1)
        theirs = document.gather(-1, candidates.flatten(2)).view(batch, rows, count, 1, -1)
        hidden = hidden | (theirs != documents[:, start : start + count * block].view(batch, 1, count, block, 1))
    return hidden
