"""Documents: links lead somewhere, and commands in them are ones that the programs take."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import export.cli
import runtime.cli
import wm_models.training.cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"artifacts", "node_modules", "site-packages"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") and part != ".github" for part in path.relative_to(ROOT).parts)
)
APPS = {"wm-run": runtime.cli.app, "wm-export": export.cli.make_app(), "wm-train": wm_models.training.cli.app}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchor(heading: str) -> str:
    """What a heading is linked by on a forge that renders it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_main_documents_are_found():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "tests/benchmarks/README.md", ".github/CONTRIBUTING.md"} <= names


@documents
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, part = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if part:
            assert part in map(anchor, HEADING.findall(target.read_text(encoding="utf-8"))), link


def commands(path: Path) -> list[list[str]]:
    """The words of each command in the document's shell blocks, without what is optional or a comment."""
    text = "".join(SHELL.findall(path.read_text(encoding="utf-8"))).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = [word.strip("[]") for word in shlex.split(line, comments=True)]
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "||", "|", "&"):
                found.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in found if command]


@documents
def test_commands_parse(path):
    """Every option and value is one that the program takes; nothing is run."""
    for words in commands(path):
        name = next((word for word in words if word in APPS), None)
        if name is None:
            continue
        arguments = words[words.index(name) + 1 :]
        program = typer.main.get_command(APPS[name])
        subcommands = getattr(program, "commands", None)
        if subcommands is not None:
            program, arguments = subcommands[arguments[0]], arguments[1:]
        program.make_context(name, arguments)


@documents
def test_programs_of_the_tests_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"python\s+(tests/\S+\.py)", text):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"python -m (test_\w+\.\w+)", text):
        assert (ROOT / "tests" / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
