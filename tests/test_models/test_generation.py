"""What transformers' generation offers, by the library itself: it works, or one line says what to do."""

import copy

import pytest
import torch
from conftest import SMALL, assert_close, baseline, ours, randomise
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
BIASES = 2  # of a key head, in the model of these tests


@pytest.fixture(scope="module")
def model():
    built = DogeForCausalLM(DogeConfig(**SMALL, num_bias_heads=4)).eval()
    randomise(built)
    return built


@pytest.fixture(scope="module")
def prompt(tokens):
    return tokens[:1, :20]


def test_drafts_of_the_first_layers(model, prompt):
    """`assistant_early_exit` drafts with fewer layers, and changes no token."""
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, assistant_early_exit=2, **GREEDY), expected)
    assert model.config.num_hidden_layers == 3


@torch.no_grad()
def test_fewer_layers_are_those_of_a_shorter_model(model, tokens):
    short = DogeForCausalLM(DogeConfig(**{**SMALL, "num_hidden_layers": 2}, num_bias_heads=4)).eval()
    short.load_state_dict(model.state_dict(), strict=False)
    try:
        model.config.num_hidden_layers = 2
        assert torch.equal(model(tokens).logits, short(tokens).logits)
    finally:
        model.config.num_hidden_layers = 3


@pytest.mark.parametrize("kind", [DogeForCausalLM, CheemsForCausalLM])
def test_drafts_of_another_model(kind, prompt):
    config = DogeConfig if kind is DogeForCausalLM else CheemsConfig
    changes = {} if kind is DogeForCausalLM else {"attn_layer_period": 3, "attn_layer_offset": 2}
    large, small = (kind(config(**{**SMALL, "num_hidden_layers": count, **changes})).eval() for count in (6, 3))
    randomise(large)
    randomise(small, seed=1)
    if kind is CheemsForCausalLM:
        with pytest.raises(ValueError, match="cache that can be cropped"):
            large.generate(prompt, assistant_model=small, **GREEDY)
        return
    assert torch.equal(large.generate(prompt, assistant_model=small, **GREEDY), large.generate(prompt, **GREEDY))


def test_prompt_lookup_and_beams(model, prompt):
    theirs = baseline()
    mine = ours(theirs)
    assert torch.equal(mine.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), mine.generate(prompt, **GREEDY))
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(mine.generate(prompt, **beams), theirs.generate(prompt, **beams))


def test_embeddings_and_a_returned_cache(model, prompt):
    expected = model.generate(prompt, **GREEDY)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **GREEDY)
    assert torch.equal(found, expected[:, 20:])
    first = model.generate(prompt, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 5})
    again = model.generate(first.sequences, cache=first.cache, **{**GREEDY, "max_new_tokens": 7})
    assert torch.equal(again, expected)


def test_continuous_batching_is_refused(model):
    config = GenerationConfig(max_new_tokens=4, eos_token_id=1)
    with pytest.raises(NotImplementedError, match="no continuous batching by generate_batch; export it"):
        model.generate_batch([[1, 2, 3]], generation_config=config)


def test_attention_weights_are_refused(model, prompt):
    with pytest.raises(ValueError, match="output_attentions is set"):
        model(prompt, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions is set"):
        model.generate(prompt, output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_attention_dropout_is_refused_in_training_alone(prompt):
    """A checkpoint that was trained with it runs; training would go on without."""
    built = DogeForCausalLM(DogeConfig(**SMALL, attention_dropout=0.5)).eval()
    assert built(prompt, labels=prompt).loss > 0
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.5; .* set it to 0\.0"):
        built.train()(prompt, labels=prompt)


@torch.no_grad()
def test_a_static_cache_that_is_there_before_its_first_token(model, prompt):
    """With room for the biases it works; sized from the config it says which size to give."""
    heads, size = model.config.num_key_value_heads, model.config.head_size
    cache = StaticCache(model.config, max_cache_len=40)
    cache.early_initialization(1, heads, size + BIASES, torch.float32, torch.device("cpu"))
    assert_close(model(prompt, cache=cache).logits, model(prompt).logits)
    narrow = StaticCache(model.config, max_cache_len=40)
    narrow.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"keys of 16 numbers; expected 18.*head_dim=18"):
        model(prompt, cache=narrow)


def test_the_exportable_module_is_refused(model, prompt):
    """It sizes its caches from the config."""
    model = copy.deepcopy(model)
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=40)
    with pytest.raises(ValueError, match="for an exportable module wm-export"):
        module.export(prompt, strict=False)


def test_prefix_tuning_is_refused_and_prompt_tuning_learns(prompt):
    built = DogeForCausalLM(DogeConfig(**SMALL))
    randomise(built)
    adapted = get_peft_model(built, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapted(input_ids=prompt, labels=prompt).loss.backward()
    assert adapted.prompt_encoder.default.embedding.weight.grad.abs().max() > 0
    adapted = get_peft_model(
        DogeForCausalLM(DogeConfig(**SMALL)), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.raises(ValueError, match="for prefix tuning take prompt tuning or LoRA"):
        adapted(input_ids=prompt, labels=prompt)


class Coarse(QuantizedLayer):
    """transformers' quantised layer, with rounding in the place of a backend of others."""

    def _quantize(self, tensor, axis):
        return tensor.round()

    def _dequantize(self, q_tensor):
        return q_tensor


def test_a_quantised_cache_is_refused(model, prompt):
    cache = DynamicCache(config=model.config)
    cache.layers = [Coarse() for _ in range(model.config.num_hidden_layers)]
    with pytest.raises(ValueError, match="the cache is quantised"):
        model(prompt, cache=cache)
