"""Attention to the w keys of largest bias, block by block: exact, and linear in the length but for one search.

The w-th largest bias never falls as keys are added, so a key that is once not among the w largest never is again. For
the queries of a block [t, t + b) only w + b keys can matter: those kept at t, and the block's own. One search over
(S / b, S) finds the keys kept at every block's start. A gather takes them, and one attention has the blocks as its
batch. A query's own choice among the w + b candidates is counted, not searched: a key of its block is kept where fewer
than w visible keys precede it in the order of selection, and the earlier keys fill what is left of w, the first ones
first. No S×S tensor is made.

The order of selection: the larger bias first, and of equal biases the later key.

B batch, S tokens, H query heads, K key/value heads, d head size, Hm rows of the bias (K or H), G bias rows a key head,
w keys kept, b tokens of a block, n blocks.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wm_models.layers.attention import attend_packed, split_bias


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
    digits: int = 1,
) -> torch.Tensor:
    """Causal attention of each query to the `keep` visible keys of largest bias: (B, H, S, d).

    query (B, H, S, d); key and value (B, K, S, d); bias (B, Hm, S), which may be wider than the keys' dtype and is then
    added in as many `digits`, see `split_bias`; `scale` multiplies the products of query and key. A
    query sees the keys of its own document up to its own position. `documents` (B, S) int64 are rising numbers, None
    for one document; below zero a token is padding, which nothing sees and whose own result has no meaning. `block`
    tokens are taken at a time.

    The backward pass computes the attention again, so masks and gathered keys are not kept.
    """
    batch, _, length, _ = query.shape
    padding = -length % block
    if documents is None:
        documents = torch.zeros(batch, length, dtype=torch.int64, device=query.device)
    if padding:
        query, key, value = (F.pad(part, (0, 0, 0, padding)) for part in (query, key, value))
        bias, documents = F.pad(bias, (0, padding)), F.pad(documents, (0, padding), value=-1)
    inputs = query, key, value, bias, scale, keep, block, documents, digits
    found = checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, torch.Tensor)
    return found[:, :, :length]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float, keep: int,
    block: int, documents: torch.Tensor, digits: int,
) -> torch.Tensor:  # fmt: skip
    """As `attend_blocks`, for whole blocks. The blocks are the batch of one attention."""
    batch, heads, length, size = query.shape
    rows, count = bias.shape[1], length // block
    with torch.no_grad():
        ranked = torch.where(documents[:, None] >= 0, bias, -torch.inf)
        scores, earlier = kept_before(ranked, documents, keep, block)
        mask = kept_keys(ranked, scores, documents, block)  # (B, Hm, n, b, w + b)
    packed = _pack_rows(key, value, bias, digits)
    own = packed.view(batch, rows, count, block, -1)
    begins = torch.arange(batch * rows, device=query.device).view(batch, rows, 1, 1) * length
    old = F.embedding(earlier + begins, packed.flatten(0, 2))  # (B, Hm, n, w, 2d + digits)
    taken = torch.cat([old, own], dim=3).transpose(1, 2).flatten(0, 1)  # (B n, Hm, w + b, 2d + digits)
    blocks = query.view(batch, heads, count, block, size).transpose(1, 2).flatten(0, 1)  # (B n, H, b, d)
    mask = mask.transpose(1, 2).flatten(0, 1)  # (B n, Hm, b, w + b)
    mask = mask[:, :, None].expand(-1, -1, heads // rows, -1, -1).flatten(1, 2)
    wide = size + digits
    y = attend_packed(blocks, taken[..., :wide], F.pad(taken[..., wide:], (0, digits)), scale, mask, digits=digits)
    return y.view(batch, count, heads, block, size).transpose(1, 2).flatten(2, 3)


def _pack_rows(key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, digits: int) -> torch.Tensor:
    """Key, bias and value of each bias row side by side: (B, Hm, S, d + digits + d). A key head serves Hm / K rows."""
    times = bias.shape[1] // key.shape[1]
    if times > 1:
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    return torch.cat([key, split_bias(bias, digits, key.dtype), value], dim=-1)


def kept_before(
    ranked: torch.Tensor, documents: torch.Tensor, keep: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys kept at each block's start, in the order of selection: their biases, and where they are, int64.

    Both are (B, Hm, n, w). ranked (B, Hm, S), -inf where a key is padding; documents (B, S). Only keys of the document
    of a block's first token count. Where there are fewer than w, the bias of the rest is -inf.
    """
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    starts = places[::block]
    before = (documents[:, None] == documents[:, starts, None]) & (places < starts[:, None])  # (B, n, S)
    scores = torch.where(before[:, None], ranked[:, :, None], -torch.inf)  # (B, Hm, n, S)
    # a stable sort of the reversed keys has the later of equals first; a top-k breaks ties as it likes
    found, order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    return found[..., :keep], places[-1] - order[..., :keep]


def kept_keys(ranked: torch.Tensor, scores: torch.Tensor, documents: torch.Tensor, block: int) -> torch.Tensor:
    """Which of its candidates each query keeps: bool (B, Hm, n, b, w + b), the earlier keys first, then the block's.

    ranked (B, Hm, S), -inf where a key is padding; scores (B, Hm, n, w), the earlier keys' biases as `kept_before`
    gives them; documents (B, S).
    """
    batch, rows, length = ranked.shape
    keep, count = scores.shape[-1], length // block
    own, document = ranked.view(batch, rows, count, block), documents.view(batch, 1, count, block)
    real = torch.isfinite(own)
    same = document[..., :, None] == document[..., None, :]  # (B, 1, n, b, b)
    square = torch.ones(block, block, dtype=torch.bool, device=ranked.device)
    # Key j (row) precedes key m (column) where its bias is larger, or equal and j is later.
    precedes = own[..., :, None] > own[..., None, :]
    precedes |= (own[..., :, None] == own[..., None, :]) & square.tril(-1)
    precedes &= same & real[..., :, None]
    rank = precedes.cumsum(-2, dtype=torch.int32)  # at query i (row): the block's keys up to i that precede m
    # Earlier keys are in view of the first token's document alone. They precede where their bias is larger.
    first = document == document[..., :1]  # (B, 1, n, b)
    larger = keep - torch.searchsorted(scores.flip(-1).contiguous(), own.contiguous(), right=True)
    rank += torch.where(first, larger, 0).int()[..., None, :]
    kept = (rank < keep) & same & square.tril() & real[..., None, :]
    kept |= square.tril() & square.triu() & ~real[..., :, None]  # a padded query sees itself, or its softmax is NaN
    free = keep - kept.sum(-1, dtype=torch.int32)  # what is left for the earlier keys
    places = torch.arange(keep, device=ranked.device, dtype=torch.int32)
    old = (places < torch.where(first, free, 0)[..., None]) & torch.isfinite(scores)[..., None, :]
    return torch.cat([old, kept], dim=-1)
