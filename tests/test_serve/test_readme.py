"""The examples of runtime/serve/README.md run as they are written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime.serve
from runtime.serve.options import ServeOptions

README = (Path(runtime.serve.__file__).parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_curl_commands_are_answered(served):
    (script,) = [block for block in blocks("sh") if "curl" in block]
    script = script.replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"finish_reason":"length"' in done.stdout
    assert done.stdout.count("data: [DONE]") == 1
    assert '"usage":{"prompt_tokens"' in done.stdout
    assert re.search(r'"text":"[0-9]+\.[0-9]+"|"finish_reason":"length"', done.stdout)
    assert "wm_new_tokens_total" in done.stdout
    assert '"error"' not in done.stdout


def test_the_python_example_runs(served):
    program, _ = blocks("python")
    program = program.replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].isdigit() or done.stdout


def test_every_path_and_option_that_it_names_is_there(served):
    paths = {route.path.partition("/{")[0] for route in served.app.routes}
    named = set(re.findall(r"(?:GET|POST) (/[\w/]*)", README))
    assert named == paths
    options = {name.replace("_", "-") for name in ServeOptions.__dataclass_fields__}
    options |= {f"no-{name}" for name, value in vars(ServeOptions()).items() if value is True}
    assert {name for name in re.findall(r"`--([\w-]+)", README) if name != "requests"} <= options


@pytest.mark.parametrize(("option", "shown"), [("queue", "64"), ("deadline", "600 s"), ("read-timeout", "20 s")])
def test_the_defaults_are_those_of_the_options(option, shown):
    assert re.search(rf"`--{option}` \| {shown} ", README)
    assert getattr(ServeOptions(), option.replace("-", "_")) == float(shown.split()[0])
