"""The model against transformers' own Doge, with the same weights."""

import copy

import pytest
import torch
from conftest import assert_close, baseline, ours
from transformers import DynamicCache

from wm_models import DogeConfig

VARIANTS = {
    "dense": {},
    "untied, biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "keep window": {"keep_window_size": 24},
    "sliding window": {"sliding_window": 20},
    "experts": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5},
    "many experts a token": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 9, "norm_topk_prob": True},
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request):
    theirs = baseline(**request.param)
    return theirs, ours(theirs)


@torch.no_grad()
def test_prefill(pair, tokens):
    theirs, mine = pair
    assert_close(mine(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, tokens, side):
    theirs, mine = pair
    if theirs.config.is_moe and side == "left":
        pytest.skip("batch routing lets padded tokens reach real ones, and what padding attends to is left open")
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, :30] = 0, 0
    if side == "right":
        mask = mask.flip(1)
    real = mask.bool()
    expected = theirs(tokens, attention_mask=mask).logits[real]
    assert_close(mine(tokens, attention_mask=mask).logits[real], expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(pair, tokens, cache):
    theirs, mine = pair
    options = {"max_new_tokens": 64, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompt = tokens[:1, :30]
    expected = theirs.generate(prompt, **options)
    found = mine.generate(prompt, cache_implementation=cache, **options)
    if mine.config.keep_window_size < 94:  # greedy text repeats tokens, whose biases tie: hold the steps to one pass
        expected_logits = mine(found.sequences).logits[:, 29:-1].transpose(0, 1)
    else:
        assert torch.equal(found.sequences, expected.sequences)
        expected_logits = torch.stack(expected.logits)
    if not mine.config.is_moe or mine.config.keep_window_size >= 94:
        assert_close(torch.stack(found.logits), expected_logits)


@torch.no_grad()
def test_cached_steps(pair, tokens):
    """64 decode steps over transformers' cache, one token at a time."""
    theirs, mine = pair
    row = tokens[:1]
    start, expected_cache, found_cache = 36, None, None
    for at in (slice(0, start), *(slice(i, i + 1) for i in range(start, 100))):
        expected = theirs(row[:, at], cache=expected_cache, use_cache=True)
        found = mine(row[:, at], cache=found_cache, use_cache=True)
        expected_cache, found_cache = expected.cache, found.cache
        assert_close(found.logits[:, -1], expected.logits[:, -1])


@torch.no_grad()
def test_the_cache_under_its_earlier_name(tokens):
    """Code written for earlier transformers goes on working: the argument and the output."""
    model = ours(baseline())
    with pytest.warns(FutureWarning, match="past_key_values"):
        first = model(tokens[:1, :30], past_key_values=DynamicCache(), use_cache=True)
    found = model(tokens[:1, 30:31], cache=first.past_key_values).logits
    assert_close(found[:, -1], model(tokens[:1, :31]).logits[:, -1])


@torch.no_grad()
def test_batched_generate_with_left_padding(pair, tokens):
    theirs, mine = pair
    if theirs.config.is_moe or theirs.config.keep_window_size < 60:
        pytest.skip("batch routing mixes rows, and repeated tokens tie at the window's edge")
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :5], mask[1, :11] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(tokens[:, :20], **options)
    for cache in ("dynamic", "static"):
        assert torch.equal(mine.generate(tokens[:, :20], cache_implementation=cache, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["dense", "untied, biased", "keep window", "sliding window", "experts"])
def test_step(variant, tokens):
    """The static step, ragged and with idle slots, against one uncached pass."""
    model = ours(baseline(**VARIANTS[variant]), expert_routing="token")
    full = model(tokens).logits
    caches, held = model.new_caches(3, 100), torch.zeros(3, dtype=torch.long)
    for new in ([40, 9, 0], [1, 1, 1], [1, 0, 1], [3, 7, 20], *[[1, 1, 1]] * 10, [0, 5, 1]):
        new = torch.tensor(new)
        ids = torch.zeros(3, int(new.max()), dtype=torch.long)
        for slot in range(3):
            ids[slot, : new[slot]] = tokens[slot, held[slot] : held[slot] + new[slot]]
        logits, caches = model.step(ids, held, new, caches)
        every, _ = model.step(ids, held, new, [type(c)(*(t.clone() for t in c)) for c in caches], all_logits=True)
        for slot in torch.nonzero(new).flatten():
            expected = full[slot, held[slot] : held[slot] + new[slot]]
            assert_close(logits[slot, 0], expected[-1])
            assert_close(every[slot, : new[slot]], expected)
        held = held + new


@torch.no_grad()
def test_token_routing_is_causal_and_equals_transformers_token_by_token(tokens):
    """In float64: these weights amplify float32's rounding to more than the limit."""
    theirs = baseline(is_moe=True, num_experts=64, num_experts_per_tok=5).double()
    mine, cache = ours(theirs, expert_routing="token").double(), None
    whole = mine(tokens[:1, :40]).logits
    assert_close(mine(tokens[:1, :20]).logits, whole[:, :20])
    for at in range(40):
        step = theirs(tokens[:1, at : at + 1], cache=cache, use_cache=True)
        cache = step.cache
        assert_close(whole[:, at], step.logits[:, -1])


@pytest.mark.parametrize("mask", [None, "padded"])
def test_training_loss_and_gradients(pair, tokens, mask):
    """In float64, where a sum that cancels (that of A's gradient) still has digits to compare."""
    if pair[0].config.norm_topk_prob:
        pytest.skip("transformers' norm_topk_prob writes in place what its own backward pass needs")
    attention_mask = None
    if mask:
        attention_mask = torch.ones_like(tokens)
        attention_mask[1, -13:] = 0
    labels = tokens if attention_mask is None else tokens.masked_fill(attention_mask == 0, -100)
    losses, gradients = [], []
    for model in (copy.deepcopy(model).double() for model in pair):
        extra = {"output_router_logits": True} if model.config.is_moe else {}
        output = model(tokens, attention_mask=attention_mask, labels=labels, **extra)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        scale = max(1e-3, expected.abs().max().item())
        assert (gradients[1][name] - expected).abs().max().item() <= 2e-5 * scale, name


def test_fully_padded_rows_stay_finite(tokens):
    model = ours(baseline())
    mask = torch.ones_like(tokens)
    mask[0, :60] = 0
    assert torch.isfinite(model(tokens, attention_mask=mask).logits).all()
    loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size is 64"),
        ({"hidden_size": 60, "num_attention_heads": 4}, "head size"),
        ({"keep_window_size": 0}, "keep_window_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 4096"),
        ({"is_moe": True, "num_experts": 15}, "num_experts is 15"),
        ({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 17}, "num_experts_per_tok is 17"),
        ({"expert_routing": "row"}, "expert_routing is 'row'"),
    ],
)
def test_config_errors(change, names):
    with pytest.raises(ValueError, match=names):
        DogeConfig(**{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **change})


def test_routing_survives_saving(tmp_path):
    for routing in ("token", "batch"):
        DogeConfig(expert_routing=routing).save_pretrained(tmp_path)
        assert DogeConfig.from_pretrained(tmp_path).expert_routing == routing


def test_rotary_frequencies_stay_float32():
    model = ours(baseline())
    before = model.model.rotary_emb.frequencies.clone()
    after = model.to(torch.bfloat16).model.rotary_emb.frequencies
    assert after.dtype == torch.float32
    assert torch.equal(before, after)
