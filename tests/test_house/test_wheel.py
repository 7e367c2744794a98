"""The wheel alone, in a fresh environment: it loads and generates without torch, and says which extra is missing."""

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from conftest import baseline, ours
from test_export.conftest import lowered

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "datasets", "matplotlib"}
pytestmark = pytest.mark.slow


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A command that sees neither this checkout nor this environment's packages."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, **options)  # type: ignore[call-overload]


def megabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built of it."""
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_sdist_has_the_tests(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    for name in ("tests/conftest.py", "tests/test_house/test_wheel.py", "tests/data/README.md", "runtime/commands.py"):
        assert name in names
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py")} <= names


def test_a_runtime_only_install_loads_and_generates(built, tmp_path, record_property):
    artifact = lowered(tmp_path / "artifact", ours(baseline(), expert_routing="token")).path
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    before = megabytes(tmp_path / "venv")

    def install(*what: str) -> None:
        done = run(programs / "pip", "install", *what, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    install(str(built[1]))
    done = run(programs / "wm-run", "generate", artifact, "--ids", "1,2,3", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "wm-models[cpu]" in done.stderr
    install(f"{built[1]}[cpu]")
    done = run(programs / "wm-run", "generate", artifact, "--ids", "1,2,3", "--max-new-tokens", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 5
    for command, extra in (("wm-export", "wm-models[export]"), ("wm-train", "wm-models[train]")):
        done = run(programs / command, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert extra in done.stderr
    installed = run(programs / "pip", "list", "--format", "freeze").stdout
    assert not HEAVY & {line.split("==")[0].lower() for line in installed.splitlines()}
    size = megabytes(tmp_path / "venv") - before
    record_property("installed MB", round(size))
    print(f"installed: {size:.0f} MB")
