"""The console commands without their extra: one line that names it, and exit code 2."""

import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from runtime import commands

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distributions(extra: str) -> set[str]:
    """The names in an extra's list, its other extras' included, as an index writes them."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = requirement.split(">=")[0]
        if name.startswith("wm-models["):
            found |= {each for inner in name[len("wm-models[") : -1].split(",") for each in distributions(inner)}
        else:
            found.add(name.replace("_", "-").lower())
    return found


@pytest.mark.parametrize("extra", commands.EXTRAS)
def test_the_modules_looked_for_are_those_of_the_extra(extra):
    provided = packages_distributions()
    brought = {name.replace("_", "-").lower() for module in commands.EXTRAS[extra] for name in provided[module]}
    assert brought == distributions(extra) or brought == distributions("gpu") - {"cuda-python"}


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        ("wm_export", "onnxscript", "wm-models[export]'"),
        ("wm_export", "onnxruntime", "wm-models[cpu]', or gpu in place of cpu"),
        ("wm_train", "datasets", "wm-models[train]'"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(command, absent, extra, monkeypatch, capsys):
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == absent else sys.__spec__)
    with pytest.raises(SystemExit) as left:
        getattr(commands, command)()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"not installed: {absent}; install with pip install '{extra}" in said


def test_each_command_starts_its_own(monkeypatch, capsys):
    for command in PROJECT["scripts"]:
        monkeypatch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit) as left:
            getattr(commands, PROJECT["scripts"][command].split(":")[1])()
        assert left.value.code == 0
        assert f"Usage: {command} " in capsys.readouterr().out
