"""The direction of imports between the packages and their rooms: import-linter's contracts in pyproject.toml."""

from pathlib import Path

from importlinter import cli

ROOT = Path(__file__).parents[2]


def test_no_import_breaks_a_contract():
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == cli.EXIT_STATUS_SUCCESS
