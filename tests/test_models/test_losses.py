"""The chunked cross entropy beside torch's own, and what training never makes."""

import pytest
import torch
from conftest import baseline, ours
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wm_models.losses
from wm_models.losses import IGNORED, next_token_loss


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 20, 16, generator=draw), torch.randn(50, 16, generator=draw)
    labels = torch.randint(0, 50, (3, 20), generator=draw)
    labels[1, 5:9] = IGNORED
    return hidden, head, labels


def reference(hidden, head, labels):
    return F.cross_entropy((hidden @ head.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("chunk", [1, 250, 10**6])
def test_loss_and_gradients(case, chunk, monkeypatch):
    """One token a chunk, several, and all at once; in float64 against torch's cross entropy."""
    monkeypatch.setattr(wm_models.losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(wm_models.losses, "MOST_CHUNKS", 60)
    *pair, labels = case
    found, expected = ([part.clone().double().requires_grad_() for part in pair] for _ in range(2))
    loss, target = next_token_loss(*found, labels), reference(*expected, labels)
    torch.testing.assert_close(loss.double(), target, rtol=1e-6, atol=0)
    (3 * loss).backward()
    (3 * target).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(*found, labels), loss)


def test_nothing_to_predict(case):
    hidden, head, labels = case
    hidden.requires_grad_()
    loss = next_token_loss(hidden, head, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_autocast(case):
    """bfloat16 products and float32 sums; gradients in the weights' own dtype."""
    *pair, labels = case
    pair = [part.clone().requires_grad_() for part in pair]
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(*pair, labels)
    loss.backward()
    assert loss.dtype == pair[1].grad.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(*(part.detach() for part in pair), labels).item(), rel=2e-2)


@pytest.mark.parametrize("experts", [False, True])
def test_parts_of_a_batch_add_up(experts, tokens):
    """Losses of two parts, each with the whole batch's count, are the whole's; the routers' loss is averaged alike."""
    changes = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4} if experts else {}
    model = ours(baseline(**changes), expert_routing="token").train()
    labels = tokens.clone()
    labels[0, :50] = IGNORED
    count = (labels[:, 1:] != IGNORED).sum()
    parts = [
        model(tokens[part], labels=labels[part], num_items_in_batch=count, output_router_logits=experts)
        for part in (slice(0, 1), slice(1, 3))
    ]
    shares = [(labels[part][:, 1:] != IGNORED).sum() / count for part in (slice(0, 1), slice(1, 3))]
    whole = model(tokens, labels=labels)
    expected = whole.loss
    if experts:
        auxiliary = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
        expected = expected + model.config.router_aux_loss_coef * auxiliary
    torch.testing.assert_close(parts[0].loss + parts[1].loss, expected)


def test_logits_are_left_out_in_training(tokens):
    model = ours(baseline())
    assert model(tokens, labels=tokens).logits.shape == (3, 100, 211)
    assert model(tokens, labels=tokens, skip_logits=True).logits is None
    model.train()
    assert model(tokens, labels=tokens).logits is None
    assert model(tokens, labels=tokens, skip_logits=False).logits is not None


class Shapes(TorchDispatchMode):
    """The shape of everything that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_training_makes_no_square_of_the_sequence_and_no_logits_of_the_batch(monkeypatch):
    monkeypatch.setattr(wm_models.losses, "CHUNK_LOGITS", 211 * 50)
    model, length = ours(baseline()).train(), 160
    ids = torch.randint(0, 211, (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(60)])[None]
    with Shapes() as shapes:
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    assert (50, 211) in shapes.seen
    for shape in shapes.seen:
        assert shape.count(length) < 2, shape
        assert not (211 in shape and torch.Size(shape).numel() >= 2 * (length - 1) * 211), shape
