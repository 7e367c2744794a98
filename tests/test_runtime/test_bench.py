"""The bench of an artifact alone: what it measures, what it imports, and that its child process is its own."""

import json
import subprocess
import sys

import pytest
from conftest import baseline, ours
from test_export.conftest import lowered

from runtime import RequestError, bench
from runtime.bench import BenchOptions, check_plot, context_lengths, measure

RUN = "from runtime.cli import main; main()"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return lowered(tmp_path_factory.mktemp("bench") / "artifact", ours(baseline(), expert_routing="token")).path


def test_it_measures_start_up_prefill_decode_slots_and_memory(artifact):
    result = measure(artifact, BenchOptions(8, 4, rounds=2, batch=2, threads=1))
    assert 0 < result["load_seconds"] < result["first_token_seconds"]
    assert result["weights_bytes"] < result["peak_bytes"]
    for name in ("prefill", "decode", "generate", "batch"):
        assert result[f"{name}_tokens_per_second"] > 0
    assert "contexts" not in result


def test_the_command_needs_neither_torch_nor_onnx_nor_matplotlib(artifact):
    """One process that says at its end which of them it has imported."""
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'onnx', 'matplotlib', 'export', 'wm_models')\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))\n"
    )
    arguments = ["bench", str(artifact), "--prompt-length", "8", "--new-tokens", "4", "--rounds", "1"]
    command = [sys.executable, "-P", "-c", code + RUN, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["dtype"] == "float32"


def test_a_users_own_runtime_in_the_working_directory_is_not_imported(artifact, tmp_path):
    for name in ("runtime", "export", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    arguments = ["bench", str(artifact), "--prompt-length", "8", "--new-tokens", "4", "--rounds", "1"]
    command = [sys.executable, "-P", "-c", RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peak memory of a process" in done.stdout


@pytest.mark.parametrize(("most", "lengths"), [(100, [100]), (128, [128]), (300, [128, 256, 300])])
def test_contexts_double_up_to_the_capacity(most, lengths):
    assert context_lengths(most) == lengths


def test_a_picture_names_the_extra_that_draws_it(monkeypatch, tmp_path):
    check_plot(tmp_path / "bench.png")
    with pytest.raises(RequestError, match=r"bench\.gif; expected a \.png"):
        check_plot(tmp_path / "bench.gif")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"needs matplotlib; install it with pip install 'wm-models\[export\]'"):
        check_plot(tmp_path / "bench.png")
