"""Documents packed into one row give what each gives alone, and what transformers gives."""

import pytest
import torch
from conftest import baseline, ours
from torch.nn import functional as F

from wm_models.layers.attention import document_index

LENGTHS = [1, 40, 2, 77, 3, 30]
VARIANTS = {
    "channels": {},
    "keep window": {"keep_window_size": 24},
    "sliding window": {"sliding_window": 20},
    "experts": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
}


def row(lengths, vocabulary=211, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.randperm(vocabulary, generator=draw)[:length] for length in lengths])[None]
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def test_index():
    positions = torch.tensor([[3, 4, 5, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    assert document_index(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@pytest.mark.parametrize("name", VARIANTS)
def test_as_if_alone(name):
    model = ours(baseline(**VARIANTS[name]), expert_routing="token").double()
    ids, positions = row(LENGTHS)
    labels = torch.where(positions == 0, -100, ids)
    packed = model(ids, position_ids=positions, labels=labels, use_cache=False)
    packed.loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(part[None], use_cache=False).logits for part in ids[0].split(LENGTHS)], dim=1)
    torch.testing.assert_close(packed.logits, alone, rtol=0, atol=1e-9)
    F.cross_entropy(alone[0, :-1], labels[0, 1:]).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lengths", [LENGTHS, [2] * 200, [1] * 400, [400]], ids=["mixed", "pairs", "ones", "one"])
def test_float32_loses_nothing_however_many_documents(lengths):
    model = ours(baseline())
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.arange(sum(lengths))[None] % 211
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part[None], use_cache=False).logits for part in ids[0].split(lengths)], dim=1)
    assert (packed - alone).abs().max() <= 1e-5 * max(1, alone.abs().max())


def test_bfloat16_keeps_more_than_256_documents_apart():
    """In the last of many documents, other ids earlier in the row change nothing at all."""
    model = ours(baseline()).bfloat16()
    ids, positions = row([1] * 300 + [100], 100)
    other = ids.clone()
    other[0, :300] = (ids[0, :300] + 1) % 100
    with torch.no_grad():
        first, second = (model(x, position_ids=positions, use_cache=False).logits[:, 300:] for x in (ids, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["channels", "sliding window"])
def test_against_transformers(name):
    theirs = baseline(**VARIANTS[name])
    ids, positions = row(LENGTHS)
    ids, positions = ids.repeat(2, 1), torch.cat([positions, torch.arange(ids.shape[1])[None]])
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions, use_cache=False).logits
        found = ours(theirs)(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_graph():
    model = ours(baseline())
    compiled = torch.compile(model, fullgraph=True)
    for step, lengths in enumerate((LENGTHS, [100, 53], [153])):
        ids, positions = row(lengths)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = compiled(ids, position_ids=positions, labels=ids, use_cache=False).loss
        expected = model(ids, position_ids=positions, labels=ids, use_cache=False).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
