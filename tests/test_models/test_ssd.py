"""State space duality against its recurrence, token by token in float64."""

import pytest
import torch

from wm_models import SSD
from wm_models.layers.ssd import Inputs, decays, scan


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, heads: int = 3) -> list[torch.Tensor]:
    """c, b, x, dt, A and a state, of batch 2, with N = 5 and P = 4."""
    c, b, x = draw(2, heads, length, 5), draw(2, heads, length, 5, seed=1), draw(2, heads, length, 4, seed=2)
    return [c, b, x, draw(2, heads, length, seed=3).exp(), -draw(heads, seed=4).exp(), draw(2, heads, 5, 4, seed=5)]


def by_definition(c, b, x, dt, A, state, real=None, first=None):
    outputs = []
    for t in range(x.shape[2]):
        old = state
        if first is not None:
            state = state * ~first[:, :, t, None, None]
        state = torch.exp(dt[:, :, t] * A)[..., None, None] * state
        state = state + b[:, :, t, :, None] * (dt[:, :, t, None] * x[:, :, t])[:, :, None]
        outputs.append((c[:, :, t, :, None] * state).sum(2))
        if real is not None:
            state = torch.where(real[:, :, t, None, None], state, old)
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("chunk", [1, 3, 8, 16])
def test_chunks_are_the_recurrence(chunk):
    """Every length from 1 to 3 chunks + 1, in float64."""
    for length in range(1, 3 * chunk + 2):
        c, b, x, dt, A, state = inputs(length)
        y, last = scan(Inputs(c, b, x, dt, A), chunk, state)
        expected, expected_last = by_definition(c, b, x, dt, A, state)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 7, 30])
def test_padding_and_first_tokens(length):
    c, b, x, dt, A, state = inputs(length)
    pick = torch.Generator().manual_seed(0)
    real = torch.rand(2, 1, length, generator=pick) < 0.7
    first = (torch.rand(2, 1, length, generator=pick) < 0.2) & real
    y, last = scan(Inputs(c, b, x, dt, A), 8, state, real, first)
    expected, expected_last = by_definition(c, b, x, dt, A, state, real, first)
    shown = real.expand(2, 3, length)
    torch.testing.assert_close(y[shown], expected[shown], rtol=0, atol=1e-10)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 20])
def test_padding_leaves_every_bit_of_the_state(length):
    c, b, x, dt, A, state = (part.float() for part in inputs(length))
    real = torch.zeros(2, 1, length, dtype=torch.bool)
    assert torch.equal(scan(Inputs(c, b, x, dt, A), 8, state, real)[1], state)


@pytest.mark.parametrize("length", [1, 11])
def test_gradients_are_finite_differences(length):
    parts = [part.requires_grad_() for part in inputs(length, heads=1)]
    first = torch.zeros(2, 1, length, dtype=torch.bool)
    first[1, 0, length // 2] = True
    real = torch.ones_like(first)
    real[0, 0, -1] = False

    def run(c, b, x, dt, A, state):
        return scan(Inputs(c, b, x, dt, A), 4, state, real, first)

    assert torch.autograd.gradcheck(run, parts)


def test_small_decays_are_not_lost_behind_large_ones():
    log_decay = torch.tensor([-3000.0, -2.5e-3, -1.7e-3, -4e-4] * 16)
    expected = decays(log_decay.double())
    found = decays(log_decay).double()
    assert (found - expected).abs().max() < 1e-6
    total = log_decay.cumsum(0)
    assert ((total[:, None] - total).exp().tril().double() - expected).abs().max() > 1e-3  # what this avoids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8192_tokens_stay_finite(dtype):
    c, b, x = (part.to(dtype).requires_grad_() for part in (draw(1, 2, 8192, 16, seed=seed) for seed in range(3)))
    dt = (20 * draw(1, 2, 8192, seed=3).abs()).float()
    A = -torch.tensor([1.0, 16.0])
    y, state = scan(Inputs(c, b, x, dt, A), 64)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    for part in (y, state, c.grad, b.grad, x.grad):
        assert part is not None
        assert torch.isfinite(part).all()


@pytest.mark.parametrize(("groups", "chunk"), [(1, 5), (2, 16), (4, 64)])
def test_module(groups, chunk):
    """Its own projections, the recurrence over them, and the skip."""
    torch.manual_seed(0)
    module = SSD(d_model=32, n_heads=4, d_state=6, n_groups=groups, chunk_len=chunk).double()
    u = draw(2, 21, 32)
    heads = lambda part, n: part.view(2, 21, n, -1).transpose(1, 2)  # noqa: E731
    b, c = (heads(proj(u), groups).repeat(1, 4 // groups, 1, 1) for proj in (module.B_proj, module.C_proj))
    x, dt = heads(module.x_proj(u), 4), torch.nn.functional.softplus(module.dt_proj(u)).transpose(1, 2)
    y, _ = by_definition(c, b, x, dt, -module.A_log.exp(), torch.zeros(2, 4, 6, 8, dtype=torch.float64))
    y = y + module.D[:, None, None] * x
    expected = module.out_proj(y.transpose(1, 2).reshape(2, 21, 32))
    torch.testing.assert_close(module(u), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(-module.A_log.exp(), -torch.arange(1.0, 5.0).double())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_heads": 5}, "d_model is 32"), ({"n_groups": 3}, "n_heads is 4"), ({"d_state": 0}, "d_state is 0")],
)
def test_module_errors(change, words):
    with pytest.raises(ValueError, match=words):
        SSD(**{"d_model": 32, "n_heads": 4, "d_state": 6, "n_groups": 1, "chunk_len": 8, **change})
