"""What a reader can hold in mind: the size of files, and of functions and signatures of the three packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES, ARGUMENTS = 400, 60, 8
# A signature that somebody else decides, by file and function, with who does.
EXCEPTIONS = {
    "wm_models/decoder.py: forward": "transformers calls models with these arguments by name",
}
FILES = sorted(path for package in ("runtime", "wm_models", "export") for path in (ROOT / package).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    name = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield f"{name}: {node.name}", node


def arguments(function: Function) -> int:
    """How many a caller sees: neither self nor cls."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [each.arg for each in (given.vararg, given.kwarg) if each]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_the_packages_are_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"runtime", "wm_models", "export"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_signatures_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    for name, function in functions(path):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < FUNCTION_LINES, name
        assert arguments(function) <= ARGUMENTS or name in EXCEPTIONS, name


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_tests_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def test_every_exception_is_needed():
    long = {name for path in FILES for name, function in functions(path) if arguments(function) > ARGUMENTS}
    assert EXCEPTIONS.keys() <= long
