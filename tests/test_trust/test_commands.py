"""What every command answers: its version, its help where nothing is asked, names to complete, a reader that leaves."""

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

MODULES = {"wm-run": "runtime.cli", "wm-train": "wm_models.training.cli"}


@pytest.fixture
def answer(monkeypatch, capsys):
    """A command's exit code and what it prints."""

    def run(name, *arguments, **environment):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(MODULES[name]).main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", MODULES)
def test_a_version(answer, name):
    assert answer(name, "--version") == (0, f"wm-models {version('wm-models')}\n", "")


@pytest.mark.parametrize("name", MODULES)
def test_a_bare_command_shows_its_help(answer, name):
    code, out, errors = answer(name)
    assert (code, out) == (2, "")
    assert errors.startswith(f"Usage: {name}")


@pytest.mark.parametrize("name", MODULES)
def test_a_shell_completes_options(answer, name):
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    code, out, _ = answer(name, **{variable: "complete_bash", "COMP_WORDS": f"{name} --vers", "COMP_CWORD": "1"})
    assert (code, out.split()) == (0, ["--version"])


@pytest.mark.parametrize("name", MODULES)
def test_a_reader_that_leaves_is_no_error(name):
    code = f"import sys; from {MODULES[name]} import main; sys.argv = [{name!r}, '--help']; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == ""


def test_presets_and_recipes_are_listed(answer):
    from wm_models import PRESETS

    code, out, _ = answer("wm-train", "--list-presets")
    assert code == 0
    assert {*PRESETS, "doge-3m"} <= set(out.split())
