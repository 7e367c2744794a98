"""What an operator can read in the log: loads, what was chosen and why, evictions, refusals; nothing of a prompt."""

import logging

import pytest

from runtime import ArtifactError, load
from test_trust.samples import make_artifact

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


def test_a_library_prints_nothing_by_itself():
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("runtime").handlers)
