"""State space duality (paper, section 3.1): a linear recurrence, computed in matrix products over chunks.

    S_t = exp(dt_t · A) · S_{t-1} + (dt_t · x_t) ⊗ b_t        zeros before the first token
    y_t = S_t · c_t

S is kept transposed, (N, P) a head, so that a row y is the row c times it.

B batch, S tokens, D hidden size, H heads, d head size; in a scan P is the size of x and N that of b and c (in a model
both are d), n chunks of Q tokens each.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from wm_models.configuration import CheemsConfig
from wm_models.layers.context import Context

CLEARED = -1e4  # a logarithm of a decay that leaves nothing: finite, so that no difference or product is NaN


class SSDCache(NamedTuple):
    """One SSD layer's static cache: of constant size, whatever the number of tokens."""

    ssd: torch.Tensor  # (B, H, d, d), float32


class SSDMixer(nn.Module):
    """One SSD layer: (B, S, D) -> (B, S, D); positions and states are the context's.

    `A = -exp(A_log)`, one number a head, is negative whatever training does. Steps and decays are float32.
    """

    cache_type = SSDCache
    by_length: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]] | None] = None  # see `scan`

    def __init__(self, config: CheemsConfig, layer: int):
        super().__init__()
        self.layer, self.head_size, self.chunk = layer, config.head_size, config.ssd_chunk_size
        size, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.c_proj = nn.Linear(size, heads * self.head_size, bias=bias)
        self.b_proj = nn.Linear(size, heads * self.head_size, bias=bias)
        self.x_proj = nn.Linear(size, heads * self.head_size, bias=bias)
        self.dt_proj = nn.Linear(size, heads, bias=bias)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.out_proj = nn.Linear(heads * self.head_size, size, bias=bias)

    def start_values(self) -> dict[str, torch.Tensor]:
        """A from -16 to -1, as in Mamba-2."""
        return {"A_log": torch.empty_like(self.A_log).uniform_(1, 16).log()}

    def new_cache(self, batch: int, capacity: int) -> SSDCache:
        """An empty static cache of `batch` slots: float32, on the weights' device."""
        heads, size = self.A_log.shape[0], self.head_size
        return SSDCache(self.A_log.new_zeros(batch, heads, size, size, dtype=state_dtype(self.A_log)))

    def project_heads(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """c, b and x, (B, H, S, d) each."""
        c, b, x = (proj(u).view(*u.shape[:2], -1, self.head_size) for proj in (self.c_proj, self.b_proj, self.x_proj))
        return c.transpose(1, 2), b.transpose(1, 2), x.transpose(1, 2)

    def forward(self, u: torch.Tensor, context: Context) -> torch.Tensor:
        c, b, x = self.project_heads(u)
        c, b = context.rotate(c), context.rotate(b)
        dt = self.dt_proj(u)
        dt = F.softplus(dt.to(state_dtype(dt))).transpose(1, 2)
        A = -self.A_log.to(dt.dtype).exp()

        def advance(
            state: SSDCache | None, real: torch.Tensor | None, first: torch.Tensor
        ) -> tuple[torch.Tensor, SSDCache]:
            before = None if state is None else state.ssd
            y, after = scan(Inputs(c, b, x, dt, A), self.chunk, before, real, first, self.by_length)
            return y, SSDCache(after)

        y = context.carry(self.layer, SSDCache, advance)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class SSD(nn.Module):
    """The mixer as a module of its own: (B, S, d_model) -> (B, S, d_model), without positions and without a cache.

    `d_state` is N. `b` and `c` exist once for each of `n_groups` groups, and head h reads those of group
    h % n_groups. Besides the recurrence there is a skip `D·x`, and every projection has a bias.
    `chunk_len` is the tokens of a chunk. Raises ValueError for sizes that do not fit each other.
    """

    def __init__(self, d_model: int, n_heads: int, d_state: int, n_groups: int, chunk_len: int):
        super().__init__()
        for name, value, divisor in (("d_model", d_model, n_heads), ("n_heads", n_heads, n_groups)):
            if divisor < 1 or value % divisor:
                raise ValueError(f"{name} is {value}; expected a multiple of {divisor}")
        if d_state < 1 or chunk_len < 1:
            raise ValueError(f"d_state is {d_state} and chunk_len {chunk_len}; expected at least 1")
        self.n_heads, self.n_groups, self.chunk_len = n_heads, n_groups, chunk_len
        self.A_log = nn.Parameter(torch.arange(1, n_heads + 1).float().log())
        self.B_proj = nn.Linear(d_model, n_groups * d_state)
        self.C_proj = nn.Linear(d_model, n_groups * d_state)
        self.x_proj = nn.Linear(d_model, d_model)
        self.dt_proj = nn.Linear(d_model, n_heads)
        self.D = nn.Parameter(torch.ones(n_heads))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = (*x.shape[:2], self.n_groups, -1)
        b, c = (
            part.view(groups).transpose(1, 2).repeat(1, self.n_heads // self.n_groups, 1, 1)
            for part in (self.B_proj(x), self.C_proj(x))
        )
        dt = self.dt_proj(x)
        dt = F.softplus(dt.to(state_dtype(dt))).transpose(1, 2)
        x = self.x_proj(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        y, _ = scan(Inputs(c, b, x, dt, -self.A_log.to(dt.dtype).exp()), self.chunk_len)
        return self.out_proj((y + self.D[:, None, None] * x).transpose(1, 2).flatten(2))


def state_dtype(like: torch.Tensor) -> torch.dtype:
    """What states, steps and decays are computed and kept in: float32, or float64 in a model of that."""
    return torch.promote_types(like.dtype, torch.float32)


class Inputs(NamedTuple):
    """What a scan reads of its tokens."""

    c: torch.Tensor  # (B, H, S, N)
    b: torch.Tensor  # (B, H, S, N)
    x: torch.Tensor  # (B, H, S, P)
    dt: torch.Tensor  # (B, H, S), in `state_dtype`
    A: torch.Tensor  # (H), negative, in `state_dtype`


def scan(
    inputs: Inputs,
    chunk: int,
    state: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    by_length: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence over S tokens: y (B, H, S, P), and the state after them (B, H, N, P).

    `chunk`, the tokens of a chunk; `state`, the one before them, None for zeros. Tokens that are not `real`, bool
    (B, 1, S), leave the state as it was; before a `first` one, bool (B, 1, S), it is cleared. `by_length` chooses the
    form, with the arguments of `scan_chunks`; by default it is the recurrence where S is known to be 1, and under
    torch.export the form whose guards hold for every S.
    """
    c, b, x, dt, A = inputs
    if real is not None:
        dt = torch.where(real, dt, 0.0)
    log_decay = A[:, None] * dt
    if first is not None:
        log_decay = torch.where(first, CLEARED, log_decay)
    x = (x * dt[..., None]).to(x.dtype)
    if state is None:
        state = dt.new_zeros(*x.shape[:2], b.shape[3], x.shape[3])
    if by_length is None:
        chunks = scan_chunks_of_any_length if torch.compiler.is_exporting() else scan_chunks
        by_length = recur if statically_known_true(x.shape[2] == 1) else chunks
    return by_length(c, b, x, log_decay, state, chunk)


def recur(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, _: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: as `scan_chunks`, for S = 1."""
    state = log_decay.exp()[..., None] * state + (b.mT * x).to(state.dtype)
    return (c.to(state.dtype) @ state).to(x.dtype), state


def scan_chunks(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any number of tokens, in matrix products only.

    As in `scan`, but x is already times dt; log_decay (B, H, S), at most 0. Returns y (B, H, S, P) and the new state.
    """
    length = x.shape[2]
    count = (length + chunk - 1) // chunk
    padding = count * chunk - length
    if not statically_known_true(padding == 0):
        c, b, x = (F.pad(part, (0, 0, 0, padding)) for part in (c, b, x))
        log_decay = F.pad(log_decay, (0, padding))
    c, b, x, log_decay = (part.unflatten(2, (count, chunk)) for part in (c, b, x, log_decay))
    y, state = _scan(c, b, x, log_decay, state)
    return y.flatten(2, 3).narrow(2, 0, length), state


def scan_chunks_of_any_length(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scan_chunks`, for torch.export with a dynamic S.

    torch.export cannot prove that padding to whole chunks is never negative, nor that there is more than one chunk. So
    tokens are gathered into S // Q + 2 chunks: the last two are empty in part or in whole.
    """
    length = x.shape[2]
    rows = torch.arange(length // chunk + 2, device=x.device)[:, None] * chunk + torch.arange(chunk, device=x.device)
    inside, rows = rows < length, rows.clamp(max=length - 1)  # (n, Q)
    c, b, x, log_decay = (part[:, :, rows] for part in (c, b, x, log_decay))
    x, log_decay = torch.where(inside[..., None], x, 0.0), torch.where(inside, log_decay, 0.0)
    y, state = _scan(c, b, x, log_decay, state)
    return y.flatten(2, 3)[:, :, torch.arange(length, device=x.device)], state


def _scan(
    c: torch.Tensor, b: torch.Tensor, x: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole chunks: c and b (B, H, n, Q, N), x (B, H, n, Q, P), log_decay (B, H, n, Q) -> y (B, H, n, Q, P), state."""
    # Inside a chunk: what token j adds, decayed by the tokens after it up to i.
    decay = decays(log_decay)  # (B, H, n, Q, Q)
    y = ((c @ b.mT) * decay).to(x.dtype) @ x
    # What each chunk adds to the state by its end; from that, the state that enters each chunk, and the last one.
    added = (b * decay[..., -1, :, None]).to(b.dtype).mT @ x  # (B, H, n, N, P)
    summed = log_decay.cumsum(-1)
    between = decays(F.pad(summed[..., -1], (1, 0)))  # (B, H, n + 1, n + 1)
    states = torch.cat([state[:, :, None], added.to(state.dtype)], dim=2).flatten(3)
    states = (between @ states).to(state.dtype).unflatten(3, state.shape[2:])
    # What each token reads of the state that entered its chunk.
    y = y + (summed.exp()[..., None] * (c @ states[:, :, :-1].to(c.dtype))).to(y.dtype)
    return y, states[:, :, -1]


def decays(log_decay: torch.Tensor) -> torch.Tensor:
    """Entry (i, j) is exp(Σ_{j<k≤i} log_decay_k) for j ≤ i, else 0: (..., Q) -> (..., Q, Q).

    Each sum is taken over its own terms: a difference of two running sums would lose the small ones behind large
    ones. Above the diagonal the sums are empty, so nothing can overflow before it is masked.
    """
    size = log_decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    terms = torch.where(lower.tril(-1), log_decay[..., None], 0.0)
    return torch.where(lower, terms.cumsum(-2).exp(), 0.0)
