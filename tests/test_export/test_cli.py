"""The commands as a person types them: what they print, and how they end."""

import json
import subprocess
import sys

import pytest

from test_export.conftest import interrupted, save_checkpoint


def command(module, *arguments, **options):
    code = f"from {module}.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_checkpoint(root / "checkpoint", tokenizer=True, vocab_size=32768)
    done = command("export", "onnx", root / "checkpoint", "--out", root / "artifact", "--max-length", 300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok  ") >= 5
    assert "verified" in done.stdout
    return root / "artifact"


def test_generate_verify_inspect_bench(artifact, typed, tmp_path):
    done = command("runtime", "generate", artifact, "--prompt", "import ", "--max-new-tokens", 8)
    assert done.returncode == 0
    assert done.stdout.strip()
    ids = typed("runtime", "generate", artifact, "--ids", "1,2,3", "--max-new-tokens", 8)
    assert 1 <= len(ids.stdout.split(",")) <= 8
    assert "verified" in typed("export", "verify", artifact).stdout
    shown = typed("export", "inspect", artifact).stdout
    for word in ("input_ids", "TensorScatter", "model.onnx.data", "layers.2.bias.out"):
        assert word in shown
    options = (
        "--prompt-length",
        16,
        "--new-tokens",
        8,
        "--rounds",
        1,
        "--json",
        "--against",
        "transformers",
        "--batch",
        2,
        "--plot",
        tmp_path / "bench.png",
    )
    result = json.loads(typed("export", "bench", artifact, *options).stdout)
    assert result["baselines"]["transformers"]["times_as_fast"] > 0
    for measured in (result["contexts"], result["bandwidth_limits"], result["baselines"]["transformers"]["contexts"]):
        assert list(measured) == ["128", "256", "300"]
        assert all(rate > 0 for rate in measured.values())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < result["load_seconds"] < result["first_token_seconds"]
    assert result["batch_over_one"] > 0
    assert result["weights_bytes"] < result["peak_bytes"]


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("export", ["onnx", "/nowhere/at/all", "--out", "OUT"], "no such directory"),
        ("export", ["onnx", "doge-21m", "--out", "OUT"], "doge-20m"),
        ("export", ["onnx", "doge-20m"], "--out"),
        ("export", ["onnx", "doge-20m", "--out", "OUT", "--max-length", "many"], "--max-length"),
        ("export", ["onnx", "doge-20m", "--out", "ARTIFACT"], "not empty"),
        ("export", ["onnx", "doge-20m", "--out", "OUT", "--max-length", "4096"], "2048"),
        ("export", ["onnx", "doge-20m", "--out", "/proc/out"], "/proc/out: cannot be written"),
        ("export", ["shrink"], "shrink"),
        ("export", ["verify", "/nowhere"], "/nowhere"),
        ("export", ["inspect", "/nowhere"], "/nowhere"),
        ("runtime", ["generate", "/nowhere", "--prompt", "x"], "/nowhere"),
        ("runtime", ["generate", "ARTIFACT"], "--prompt"),
        ("runtime", ["generate", "ARTIFACT", "--ids", "1,x"], "1,x"),
        ("runtime", ["generate", "ARTIFACT", "--ids", "1,32768"], "32768"),
        ("runtime", ["generate", "ARTIFACT", "--prompt", "x " * 400], "300"),
        ("runtime", ["generate", "ARTIFACT", "--prompt", "x", "--top-p", "7"], "top_p"),
        ("runtime", ["generate", "ARTIFACT", "--prompt", ""], "empty"),
        ("export", ["bench", "ARTIFACT", "--against", "nothing"], "transformers"),
        ("runtime", ["bench", "ARTIFACT", "--prompt-length", "400"], "capacity"),
        ("runtime", ["bench", "ARTIFACT", "--plot", "/nowhere/bench.png"], "/nowhere/bench.png"),
        ("export", ["bench", "ARTIFACT", "--prompt-length", "400"], "capacity"),
    ],
)
def test_errors_are_one_line_and_exit_2(artifact, typed, tmp_path, module, arguments, words):
    places = {"OUT": str(tmp_path / "out"), "ARTIFACT": str(artifact)}
    done = typed(module, *(places.get(word, word) for word in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bare_command_shows_its_help():
    done = command("runtime")
    assert done.returncode == 2
    assert "\n  generate " in done.stderr


def test_version_and_presets(typed):
    from importlib.metadata import version

    assert version("wm-models") in typed("export", "--version").stdout
    assert typed("export", "--list-presets").stdout.split()[:3] == ["doge-3m", "doge-3m-instruct", "doge-20m"]


def test_debug_shows_the_traceback():
    done = command("runtime", "generate", "/nowhere", "--prompt", "x", "--debug")
    assert "Traceback" in done.stderr


def test_ctrl_c_leaves_nothing(tmp_path):
    code, errors = interrupted(["onnx", "doge-60m", "--out", str(tmp_path / "out")], tmp_path, "*")
    assert code == 130, errors
    assert not list(tmp_path.iterdir())
