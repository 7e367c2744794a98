"""The hybrid: its caches, its padding, its log, and the same result whatever the way through it."""

import logging

import pytest
import torch
from conftest import SMALL, golden, randomise
from conftest import assert_close as reference_close
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from wm_models import CheckpointError, CheemsConfig, CheemsForCausalLM, shipped_tokenizer

HYBRID = {**SMALL, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "ssd_chunk_size": 8}
ROUTED = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 5}


def small(dtype: torch.dtype = torch.float64, **changes: object) -> CheemsForCausalLM:
    model = CheemsForCausalLM(CheemsConfig(**{**HYBRID, **changes})).eval()
    randomise(model)
    return model.to(dtype)


@pytest.fixture(scope="module", params=[{}, ROUTED], ids=["dense", "experts"])
def model(request):
    return small(**request.param)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def long_tokens() -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (2, 280), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
def test_any_split_and_256_decode_steps_are_one_pass(model, long_tokens, cache_type):
    full = model(long_tokens).logits
    for splits in ([280], [1, 1, 3, 8, 17, 100, 150], [24] + [1] * 256):
        cache = DynamicCache(config=model.config)
        if cache_type is StaticCache:
            cache = StaticCache(config=model.config, max_cache_len=300)
        done = 0
        for size in splits:
            logits = model(long_tokens[:, done : done + size], cache=cache, use_cache=True).logits
            assert_close(logits, full[:, done : done + size])
            done += size
        assert done == 280


@torch.no_grad()
def test_step(model, tokens):
    """Static caches: ragged chunks and idle slots, whose states keep every bit, against one uncached pass."""
    full = model(tokens).logits
    caches, held = model.new_caches(3, 100), torch.zeros(3, dtype=torch.long)
    for cache in caches:
        for part in cache:
            part.fill_(7)  # what a slot held before does not matter
    for new in ([40, 9, 0], [1, 1, 1], [1, 0, 1], [3, 7, 20], *[[1, 1, 1]] * 10, [0, 5, 1]):
        new = torch.tensor(new)
        ids = torch.zeros(3, int(new.max()), dtype=torch.long)
        for slot in range(3):
            ids[slot, : new[slot]] = tokens[slot, held[slot] : held[slot] + new[slot]]
        before = caches[0].ssd.clone()
        logits, caches = model.step(ids, held, new, caches)
        for slot in range(3):
            if new[slot]:
                assert_close(logits[slot, 0], full[slot, held[slot] + new[slot] - 1])
            else:
                assert torch.equal(caches[0].ssd[slot], before[slot])
        held = held + new


def test_caches_are_of_the_layers_own_kind(model):
    small_caches, large = model.new_caches(2, 50), model.new_caches(2, 500)
    assert [type(cache).__name__ for cache in large] == ["SSDCache", "AttentionCache"] * 2
    assert large[0].ssd.shape == small_caches[0].ssd.shape == (2, 4, 16, 16)
    assert small(torch.bfloat16).new_caches(1, 4)[0].ssd.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["rows", "square"])
def test_padding_touches_neither_logits_nor_states(model, tokens, side, form):
    """The mask as (B, L), and as what transformers makes of it for a static cache, (B, 1, S, L)."""
    lengths = [100, 93, 70]
    mask = torch.stack([(torch.arange(100) < length).long() for length in lengths])
    ids = tokens * mask
    if side == "left":
        mask = mask.flip(1)
        ids = torch.stack([row.roll(100 - length) for row, length in zip(ids, lengths, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given, cache = mask, DynamicCache(config=model.config)
    if form == "square":
        given = mask[:, None, None].bool() & torch.ones(100, 100, dtype=torch.bool).tril()
    found = model(ids, attention_mask=given, position_ids=positions, cache=cache, use_cache=True).logits
    for slot, length in enumerate(lengths):
        alone = DynamicCache(config=model.config)
        expected = model(tokens[slot : slot + 1, :length], cache=alone, use_cache=True).logits[0]
        assert_close(found[slot][mask[slot].bool()], expected)
        for layer in (0, 2):
            assert_close(cache.layers[layer].recurrent_states[0][slot], alone.layers[layer].recurrent_states[0][0])


@torch.no_grad()
def test_documents_packed_in_one_row(model, tokens):
    """A token at position 0 begins a sequence: with a mask of blocks, each document is as if it were alone."""
    lengths = [13, 40, 1, 30]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    mask = ((owner[:, None] == owner) & torch.ones(84, 84, dtype=torch.bool).tril())[None, None]
    found = model(tokens[:1, :84], attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    for document in range(4):
        expected = model(tokens[0, :84][owner == document][None]).logits[0]
        assert_close(found[owner == document], expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model, tokens, cache):
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :5], mask[1, :11] = 0, 0
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens[:, :20], attention_mask=mask, cache_implementation=cache, **options)
    for slot, padding in enumerate((5, 11, 0)):
        ids = tokens[slot : slot + 1, padding:20]
        for _ in range(30):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found[slot, padding:], ids[0])


@torch.no_grad()
def test_torch_export_with_a_dynamic_sequence(long_tokens):
    """One program for every length: less than a chunk of 8, whole chunks, and one token more or less."""
    model = small(num_hidden_layers=2)
    sequence = {"input_ids": {1: torch.export.Dim("sequence", min=2, max=512)}, "use_cache": None}
    sample = {"input_ids": long_tokens[:, :21].contiguous(), "use_cache": False}
    program = torch.export.export(model, (), sample, dynamic_shapes=sequence).module()
    for length in (2, 7, 8, 9, 16, 21, 280):
        ids = long_tokens[:, :length]
        found = program(input_ids=ids, use_cache=False).logits
        assert_close(found, model(ids, use_cache=False).logits)


def test_gradients_are_finite_differences():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    model = small(**sizes, vocab_size=11, pad_token_id=None)  # a padding token's embedding has no gradient, by design
    ids = torch.randint(0, 11, (2, 13), generator=torch.Generator().manual_seed(0))
    direction = torch.Generator().manual_seed(1)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for name, parameter in model.named_parameters():
        step = torch.randn(parameter.shape, generator=direction, dtype=torch.float64) * 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
                losses.append(loss())
                parameter.sub_(sign * step)
        slope = (parameter.grad * step).sum()
        assert abs((losses[0] - losses[1]) / 2 - slope) <= 1e-6 * max(abs(slope), 1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8192_tokens_stay_finite_from_the_first_step(dtype):
    config = {**HYBRID, "num_hidden_layers": 2, "max_position_embeddings": 8192, "ssd_chunk_size": 64}
    model = CheemsForCausalLM(CheemsConfig(**config)).to(dtype)
    ids = torch.randint(0, SMALL["vocab_size"], (1, 8192), generator=torch.Generator().manual_seed(0))
    outputs = model(ids, labels=ids, use_cache=False, skip_logits=False)
    outputs.loss.backward()
    assert torch.isfinite(outputs.logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_starts_as_mamba_2():
    model = CheemsForCausalLM(CheemsConfig(**{**HYBRID, "num_attention_heads": 32}))
    rates = model.model.layers[0].ssd.A_log.exp()
    assert 1 <= rates.min() < rates.max() <= 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 60}, "head size"),
        ({"attn_layer_period": 0}, "attn_layer_period is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"attn_layer_offset": 2}, "attn_layer_offset is 2; expected 0 to attn_layer_period - 1, 1"),
        ({"sliding_window": 20}, "sliding_window is 20"),
        ({"ssd_chunk_size": 0}, "ssd_chunk_size is 0"),
    ],
)
def test_config_errors(change, words):
    with pytest.raises(ValueError, match=words):
        CheemsConfig(**{**HYBRID, **change})


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "kind"),
    [({"attn_layer_period": 1, "attn_layer_offset": 0}, "attention"), ({"attn_layer_period": 9,
      "attn_layer_offset": 7}, "ssd")],
)  # fmt: skip
def test_layers_of_one_kind_are_allowed_and_logged(change, kind, tokens, caplog):
    with caplog.at_level(logging.WARNING, logger="wm_models"):
        model = small(**change)
    assert f"make all 4 layers {kind}" in caplog.text
    ids = tokens[:1, :10]
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation=cache), expected)


@torch.no_grad()
def test_saved_loaded_and_found_by_name(tmp_path, tokens):
    model = small(torch.float32)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CheemsConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, CheemsForCausalLM)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cheems-2025-01-dense", "cheems-2025-01-ragged", "cheems-2025-01-cdmoe"])
def test_public_checkpoints(name, tmp_path):
    reference = golden(name)
    found = CheemsForCausalLM.from_pretrained(reference.save(tmp_path)).eval()(reference.inputs["input_ids"]).logits
    reference_close(found, reference.outputs["logits"])


def test_a_decay_that_grows_is_refused(tmp_path):
    reference = golden("cheems-2025-01-dense")
    directory = reference.save(tmp_path)
    state = load_file(directory / "model.safetensors")
    state["model.layers.2.ssd.A"][1] = 1.0
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.ssd\.A reaches 1; expected numbers below 0") as caught:
        CheemsForCausalLM.from_pretrained(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_from_text_to_text():
    """The example that introduces the model, with the shipped tokenizer and a small config."""
    tokenizer = shipped_tokenizer()
    model = CheemsForCausalLM(CheemsConfig(**{**HYBRID, "vocab_size": len(tokenizer)}))
    inputs = tokenizer("Hi, how are you today?", return_tensors="pt")
    outputs = model.generate(**inputs, max_length=40)
    assert tokenizer.batch_decode(outputs)[0].startswith("Hi, how are you today?")
