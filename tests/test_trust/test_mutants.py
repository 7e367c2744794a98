"""The verification is itself tested: no graph that is wrong in one place passes it."""

import json

import pytest

from test_trust.mutants import CACHE_MUTANTS, MUTANTS, SAME_WHEN_FRESH, judge, make_sound


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return {fresh: make_sound(tmp_path_factory.mktemp("sound"), fresh) for fresh in (False, True)}


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_is_caught(sound, tmp_path, mutate):
    verdicts = judge(sound[False], mutate, tmp_path / "mutant")
    assert not all(verdict.passed for verdict in verdicts)
    assert json.loads((tmp_path / "mutant" / "manifest.json").read_text())["verified"] is False


@pytest.fixture(scope="module")
def sound_int8_cache(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("int8"), False, "int8")


@pytest.mark.parametrize("mutate", CACHE_MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_of_an_int8_cache_is_caught(sound_int8_cache, tmp_path, mutate):
    assert not all(verdict.passed for verdict in judge(sound_int8_cache, mutate, tmp_path / "mutant"))


BIAS = [mutate for mutate in MUTANTS if any(word in mutate.__name__ for word in ("bias", "selection"))]


@pytest.mark.parametrize("mutate", BIAS, ids=lambda mutate: mutate.__name__)
def test_a_bias_that_is_out_of_sight_is_looked_at(sound, tmp_path, mutate):
    """With A = 0 every bias is 1 and does nothing, so only the comparison with another A can tell."""
    assert mutate not in SAME_WHEN_FRESH
    assert not all(verdict.passed for verdict in judge(sound[True], mutate, tmp_path / "mutant"))


def test_the_command_fails_with_exit_code_1(sound, tmp_path, monkeypatch, capsys):
    from export import cli

    judge(sound[False], MUTANTS[0], tmp_path / "mutant")
    monkeypatch.setattr("sys.argv", ["wm-export", "verify", str(tmp_path / "mutant")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "checks failed" in capsys.readouterr().err
