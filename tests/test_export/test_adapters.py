"""PEFT's adapters, exported over their base."""

import json

import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model

from export import ExportError, OnnxOptions, export_onnx
from export.source import Source, is_local
from export.verification.record import VERIFICATION
from runtime import load
from test_export.conftest import save_checkpoint
from wm_models import DogeForCausalLM


def randomise_adapter(model):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


@pytest.fixture
def adapted(tmp_path):
    """The base's directory, the adapter's, and the model with the adapter, nothing of it at its start."""
    base = save_checkpoint(tmp_path / "base")
    model = get_peft_model(DogeForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomise_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", model.eval()


@torch.no_grad()
def test_an_adapter_is_merged_verified_and_run(adapted, tmp_path):
    base, adapter, model = adapted
    comparisons = export_onnx(adapter, tmp_path / "artifact", OnnxOptions(max_length=60))
    assert all(comparison.passed for comparison in comparisons)
    ids = torch.arange(3, 23)[None] % SMALL["vocab_size"]
    expected = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    assert load(tmp_path / "artifact").generate_ids(ids[0].tolist(), 10) == expected
    sources = json.loads((tmp_path / "artifact" / VERIFICATION).read_text())["source"]["files"]
    assert {"adapter_model.safetensors", f"{base}/model.safetensors"} <= sources.keys()


def change(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_refusals(adapted, tmp_path):
    _, adapter, _ = adapted
    assert is_local(str(adapter))
    change(adapter, base_model_name_or_path="somebody/model")
    assert not is_local(str(adapter))
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(ExportError, match="base_model_name_or_path is None; expected the checkpoint it is for"):
        Source(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"without adapter_model\.safetensors"):
        Source(str(adapter))


def test_an_adapter_of_another_size_is_refused(adapted, tmp_path):
    _, adapter, _ = adapted
    other = save_checkpoint(tmp_path / "other", hidden_size=96)
    change(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ExportError, match="adapter: does not fit"):
        Source(str(adapter)).load_model()
