"""Hugging Face's clients run what `wm-export hf-onnx` writes, and say what the engine says."""

import json

import pytest
from test_export.conftest import VARIANTS, save_checkpoint

from export.errors import ExportError
from export.targets.base import write_artifact
from export.targets.hf_onnx import HF_ONNX, HfOnnxOptions
from export.verification.record import VERIFICATION
from test_clients.conftest import (
    PROMPTS,
    TOKENS,
    needs_npm,
    needs_openvino,
    needs_optimum,
    run_node,
    run_optimum,
)


@needs_npm("@huggingface/transformers")
def test_transformers_js_writes_the_engines_ids_from_a_left_padded_batch(hf_layout, expected):
    assert run_node("transformers_js.mjs", hf_layout, TOKENS, json.dumps(PROMPTS)) == expected


@needs_optimum
def test_optimum_writes_the_engines_ids_from_a_left_padded_batch(hf_layout, expected):
    assert run_optimum("optimum_generates.py", hf_layout, TOKENS, json.dumps(PROMPTS)) == expected


@needs_openvino
def test_openvino_is_in_the_table(hf_layout):
    cases = [found["case"] for found in json.loads((hf_layout / VERIFICATION).read_text())["comparisons"]]
    assert any(case.startswith("OpenVINO: ragged batch") for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "biased, untied", "experts", "sliding window", "dynamic rope", "fp16"])
def test_the_layout_agrees_with_the_eager_model(name, tmp_path):
    changes, options = VARIANTS[name]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **changes)
    options = HfOnnxOptions(dtype=options.get("dtype", "fp32"), max_length=80)
    written = write_artifact(HF_ONNX, checkpoint, tmp_path / "model", options)
    assert all(found.passed for found in written.comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4 experts"])
def test_quantised_the_graph_is_there_for_onnx_runtime_and_for_others(name, tmp_path):
    changes, options = VARIANTS[name]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **changes)
    options = HfOnnxOptions(quantize=options["quantize"], max_length=80)
    written = write_artifact(HF_ONNX, checkpoint, tmp_path / "model", options)
    assert all(found.passed for found in written.comparisons)
    names = {path.name for path in (tmp_path / "model" / "onnx").iterdir()}
    assert names == {"model.onnx", "model_portable.onnx", "model.onnx_data"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 3}, "is a classifier"),
        ({"attn_layer_period": 3, "attn_layer_offset": 1, "ssd_chunk_size": 16}, "layer 0 is SSDMixer.*genai"),
    ],
)
def test_refusals_name_what_the_layout_cannot_take(changes, words, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", **changes)
    with pytest.raises(ExportError, match=words):
        write_artifact(HF_ONNX, checkpoint, tmp_path / "model", HfOnnxOptions())
    assert not (tmp_path / "model").exists()


def test_bfloat16_is_refused():
    with pytest.raises(ExportError, match="these clients compute with fp32 or fp16"):
        HfOnnxOptions(dtype="bf16")
