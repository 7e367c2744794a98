"""One graph and no recompilation, counted by torch itself."""

import pytest
import torch
from conftest import SMALL, baseline, ours, randomise
from test_export.conftest import PAIR
from torch._dynamo.utils import counters
from transformers import StaticCache

from wm_models import CheemsConfig, CheemsForCausalLM

LAYERS = {"num_hidden_layers": 2}
ROUTED = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.fixture(params=["dense", "experts", "hybrid"])
def model(request):
    if request.param == "classifier":
        return ours(baseline(**LAYERS, num_labels=3))
    if request.param == "hybrid":
        hybrid = CheemsForCausalLM(CheemsConfig(**{**SMALL, **PAIR}))
        randomise(hybrid)
        return hybrid.eval()
    return ours(baseline(**LAYERS, **(ROUTED if request.param == "experts" else {})), expert_routing="token")


def test_training_forward_and_backward(model, tokens):
    compiled = torch.compile(model, fullgraph=True)
    mask = torch.ones_like(tokens)
    mask[1, -20:] = 0
    extra = {"output_router_logits": True} if model.config.is_moe else {}
    for step in range(3):
        labels = tokens.roll(step, 1)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(labels, attention_mask=mask, labels=labels, use_cache=False, **extra).loss
            loss.backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        eager = model(labels, attention_mask=mask, labels=labels, use_cache=False, **extra).loss
        eager.backward()
        assert loss.item() == pytest.approx(eager.item(), rel=1e-5)
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad()


@pytest.mark.parametrize("changes", [{}, {"keep_window_size": 24}], ids=["all keys", "blocks"])
def test_checkpointed_layers_have_the_gradients_of_eager_ones(changes, tokens):
    """Each layer, or each block's attention, is computed again in the backward pass."""
    model = ours(baseline(num_hidden_layers=2), expert_routing="token", **changes).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_prefill(model, tokens):
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for index, length in enumerate((50, 61, 72, 90)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = compiled(tokens[:, :length], use_cache=False).logits
        torch.testing.assert_close(found, model(tokens[:, :length]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", ["dense", "experts", "hybrid", "classifier"], indirect=True)
def test_step_prefill_and_decode(model, tokens):
    """Static caches: one compilation for the prompt, one for decode, at any position and with any slot idle."""
    compiled = torch.compile(model.step, fullgraph=True)
    caches, held, full = model.new_caches(3, 100), torch.tensor([0, 0, 0]), model.head(model.model(tokens)[0])
    new = torch.tensor([30, 11, 23])
    logits, _ = compiled(tokens[:, :30], held, new, caches)
    held = held + new
    for step in range(40):
        active = torch.tensor([1, 1, int(step % 3 > 0)])
        ids = tokens.gather(1, held[:, None])
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            logits, _ = compiled(ids, held, active, caches)
        for slot in torch.nonzero(active).flatten():
            torch.testing.assert_close(logits[slot, 0], full[slot, held[slot]], rtol=1e-4, atol=1e-4)
        held = held + active


@torch.no_grad()
def test_a_share_of_the_keys_dropped(tokens):
    """`dynamic_mask_ratio`, against the eager steps: how many keys go depends on each slot's length at each step."""
    model = ours(baseline(num_hidden_layers=1), dynamic_mask_ratio=0.25)
    compiled = torch.compile(model.step, fullgraph=True)
    caches, others = model.new_caches(3, 60), model.new_caches(3, 60)
    held, new = torch.zeros(3, dtype=torch.int64), torch.tensor([30, 11, 23])
    for step in range(10):
        ids = tokens[:, :30] if step == 0 else tokens.gather(1, held[:, None])
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            found, caches = compiled(ids, held, new, caches)
        expected, others = model.step(ids, held, new, others)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        held, new = held + new, torch.ones_like(new)
    whole = torch.compile(model, fullgraph=True)(tokens, use_cache=False).logits
    torch.testing.assert_close(whole, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decode_over_transformers_static_cache(model, tokens):
    """What `generate` compiles: the forward pass over a StaticCache, its mask made outside."""
    cache = StaticCache(config=model.config, max_cache_len=100)
    model(tokens[:, :20], cache=cache, use_cache=True)
    compiled, full = torch.compile(model, fullgraph=True), model(tokens).logits
    for at in range(20, 60):
        positions = torch.full((1, 1), at)
        mask = model.create_masks_for_generate(model.config, torch.empty(3, 1, 0), None, cache, position_ids=positions)
        with torch._dynamo.config.patch(error_on_recompile=at > 20):
            logits = compiled(tokens[:, at : at + 1], attention_mask=mask, position_ids=positions, cache=cache).logits
        torch.testing.assert_close(logits[:, -1], full[:, at], rtol=1e-4, atol=1e-4)


def test_generate_compiles_itself(tokens):
    """`_can_compile_fullgraph` lets `generate` compile the decode step; the token ids stay the same."""
    from transformers import CompileConfig

    model = ours(baseline())
    assert model._can_compile_fullgraph
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(tokens[:1, :20], **options)
    found = model.generate(tokens[:1, :20], cache_implementation="static", compile_config=config, **options)
    assert counters["stats"]["unique_graphs"] >= 1
    assert torch.equal(found, expected)
