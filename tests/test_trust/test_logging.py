"""What an operator can read in the log: loads, exports, checkpoints, what was chosen and why; nothing of a text."""

import logging

import pytest
from test_training.conftest import TINY, write_corpus

from export import OnnxOptions, export_onnx, verify
from runtime import ArtifactError, load
from test_trust.samples import make_artifact, make_checkpoint
from wm_models import CheckpointError, DogeForCausalLM
from wm_models.training import Recipe, TrainingError, train

PROMPT = [31, 41, 59, 26]


def test_a_load_says_what_from_where_how_and_why(artifact, caplog):
    with caplog.at_level(logging.INFO, "runtime"):
        load(artifact)
    *passed, last = [record.getMessage() for record in caplog.records]
    assert all(record.name.startswith("runtime.") for record in caplog.records)
    assert all(" is passed over: " in message for message in passed)
    for words in (str(artifact), "doge", "float32", "backend cpu (auto was asked for) on CPU", "unsigned", " s"):
        assert words in last


def test_a_refusal_is_logged(copy, caplog):
    (copy / "config.json").write_text("{}")
    with pytest.raises(ArtifactError) as raised:
        load(copy)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == f"refused to load {copy}: {raised.value}"


def test_evictions_are_counted_and_prompts_are_not_told(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "runtime"):
        engine = load(make_artifact(tmp_path, keep_window_size=32))
        engine.generate_ids(PROMPT * 60, 8)
    told = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("runtime"))
    assert "cache rows evicted" in told
    assert "31, 41" not in told


@pytest.mark.parametrize("package", ["runtime", "export", "wm_models"])
def test_a_library_prints_nothing_by_itself(package):
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger(package).handlers)


def told_by(caplog, name, level=logging.INFO):
    """What a package's loggers said, of at least this level."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.split(".")[0] == name and record.levelno >= level
    ]


def test_an_export_says_what_from_where_how_long_and_what_was_found(tmp_path, caplog):
    source, out = make_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1), tmp_path / "artifact"
    with caplog.at_level(logging.DEBUG, "export"), caplog.at_level(logging.DEBUG, "wm_models"):
        comparisons = export_onnx(source, out, OnnxOptions(max_length=64, max_batch=1))
    opened, exported = told_by(caplog, "export")
    assert opened == f"source {source}: checkpoint in {source}"
    assert exported.startswith(f"exported {source} to {out}: target onnx, float32, quantization none, ")
    assert f", {len(comparisons)} checks passed, " in exported
    assert exported.endswith(" s")
    assert [message for message in told_by(caplog, "export", logging.DEBUG) if message.startswith("Comparison(")] == [
        str(comparison) for comparison in comparisons
    ]
    told = told_by(caplog, "wm_models")
    assert any(message.startswith(f"{source}: a checkpoint of format ") for message in told)
    assert any(message.startswith(f"loaded DogeForCausalLM from {source} in ") for message in told)


def test_what_fails_its_verification_is_a_warning(copy, caplog, monkeypatch):
    """And what was refused."""
    monkeypatch.setattr("export.verification.comparison.LOGIT_TOLERANCE", 0.0)
    with caplog.at_level(logging.INFO, "export"):
        comparisons = verify(copy)
    assert not all(comparison.passed for comparison in comparisons)
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    warnings = told_by(caplog, "export", logging.WARNING)
    assert set(failed) <= set(warnings)
    assert f"{len(failed)} of {len(comparisons)} checks failed; worst: " in told_by(caplog, "export")[-1]


def test_what_is_refused_is_a_warning(tmp_path, caplog):
    with pytest.raises(CheckpointError) as raised:
        DogeForCausalLM.from_pretrained(tmp_path)
    assert told_by(caplog, "wm_models") == [f"refused to load a DogeForCausalLM: {raised.value}"]
    with pytest.raises(CheckpointError) as raised:
        export_onnx(tmp_path, tmp_path / "out")
    assert told_by(caplog, "export") == [
        f"refused to export {tmp_path} to {tmp_path / 'out'} with target onnx: {raised.value}"
    ]


def test_training_tells_its_checkpoints_and_nothing_of_the_text(tmp_path, caplog):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    recipe, out = Recipe(**{**TINY, "data": [str(write_corpus(corpus))], "steps": 2}), tmp_path / "out"
    with caplog.at_level(logging.DEBUG, "wm_models"):
        train(recipe, out)
        train(recipe, out, resume=True)
        with pytest.raises(TrainingError) as raised:
            train(recipe, out)
    begun, written, *_, resumed, _, _, refused = told = [
        message for message in told_by(caplog, "wm_models") if "a checkpoint of format" not in message
    ]
    assert begun.startswith(f"{out}: begun, 2 steps, doge-20m, fp32, 4 documents, ")
    assert written.startswith(f"{out / 'checkpoints' / 'checkpoint-2'} written in ")
    assert resumed.startswith(f"{out}: resumed from {out / 'checkpoints' / 'checkpoint-2'}, ")
    assert refused == f"refused to train into {out}: {raised.value}"
    assert any(message.startswith(f"{out} finished in ") for message in told)
    everything = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("wm_models"))
    assert "function_" not in everything
    assert "return value" not in everything
