"""Whole runs: one graph, the same curve however it is computed, and nothing lost when one is killed."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast

from test_training.conftest import TINY
from wm_models import DogeForCausalLM
from wm_models.training import Recipe, TrainingError, train
from wm_models.training.cli import RecipeOptions
from wm_models.training.report import Progressing
from wm_models.training.run import estimate, prepare

COMMAND = "from wm_models.training.cli import main; main()"


def recipe(corpus, **changes):
    return Recipe(**{**TINY, "data": [str(corpus)], **changes})


def curve(out, steps=TINY["steps"]):
    """Training and held-out losses by step, out of the last checkpoint."""
    state = json.loads((out / "checkpoints" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return {
        (key, entry["step"]): entry[key]
        for entry in state["log_history"]
        for key in ("loss", "eval_loss")
        if key in entry
    }


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    values = train(recipe(corpus), out)
    return out, values


def test_what_a_run_leaves(finished):
    out, values = finished
    names = {"config.json", "model.safetensors", "tokenizer.json", "loss.png", "training.json", "recipe.toml", "logs"}
    assert names <= {path.name for path in out.iterdir()}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert json.loads((out / "training.json").read_text()) == values
    assert Recipe.load(str(out / "recipe.toml"), {}) == Recipe.load(str(out / "recipe.toml"), {"seed": 0})
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "logs").iterdir())
    losses = curve(out)
    assert sorted(step for key, step in losses if key == "eval_loss") == [0, 3, 6, 8]
    assert losses["eval_loss", 8] < losses["eval_loss", 0] - 0.1
    assert values["held_out_loss"] == losses["eval_loss", 8]


def test_the_finished_model_has_the_reported_loss(finished, corpus):
    """Measured here one document at a time, without rows or padding, up to what a row's beginning costs."""
    out, values = finished
    model, tokenizer = DogeForCausalLM.from_pretrained(out).eval(), PreTrainedTokenizerFast.from_pretrained(out)
    assert model.config.use_cache
    ids = [0, *tokenizer((corpus / "held.py").read_text()).input_ids, 1]
    total = 0.0
    for start in range(0, len(ids) - 1, 31):
        row = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            total += model(row, labels=row).loss.item() * (row.shape[1] - 1)
    assert values["held_out_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_resuming_what_is_finished_changes_nothing(finished, corpus):
    out, values = finished
    assert train(recipe(corpus), out, resume=True) == values


@pytest.mark.parametrize("step", [1, 5])
def test_killed_and_resumed(finished, corpus, tmp_path, step):
    """A run that dies in the middle of a step, before or after its first checkpoint, ends with the same curve."""
    code = f"""
import os, signal, sys
from pathlib import Path
from wm_models.training import Recipe, train
from wm_models.training.trainer import RowTrainer
inner = RowTrainer.compute_loss
def deadly(self, *args, **kwargs):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(self, *args, **kwargs)
RowTrainer.compute_loss = deadly
train(Recipe(**{ {**TINY, "data": [str(corpus)]}!r}), Path(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    values = train(recipe(corpus), tmp_path / "out", resume=True)
    assert curve(tmp_path / "out") == curve(finished[0])
    assert values == finished[1]


def test_killed_while_a_checkpoint_is_written(finished, corpus, tmp_path, monkeypatch):
    """Half a checkpoint never has a checkpoint's name."""
    out = tmp_path / "out"

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wm_models.training.trainer.Trainer._save_rng_state", fail)
        with pytest.raises(
            TrainingError, match=r"checkpoint-2: cannot be written: .*No space left.*checkpoint is None"
        ):
            train(recipe(corpus), out)
    assert not list((out / "checkpoints").iterdir())
    train(recipe(corpus), out, resume=True)
    assert curve(out) == curve(finished[0])


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    inner = torch.optim.AdamW.step

    def ruin(self, *args, **kwargs):
        result = inner(self, *args, **kwargs)
        ruin.calls += 1
        if ruin.calls == 3:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)
        return result

    ruin.calls = 0
    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan at learning rate 0\.005; .*checkpoint-2"):
        train(recipe(corpus), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_another_recipe_or_other_data(finished, corpus, tmp_path):
    out, _ = finished
    with pytest.raises(
        TrainingError, match=r"seed was 0 and is 1; sequence_length|sequence_length was 32 .* seed was 0"
    ):
        train(recipe(corpus, seed=1, sequence_length=16), out, resume=True)
    with pytest.raises(TrainingError, match="is not empty"):
        train(recipe(corpus), out)
    with pytest.raises(TrainingError, match="no run to resume"):
        train(recipe(corpus), tmp_path, resume=True)
    (out / "data.sha256").write_text("other")
    with pytest.raises(TrainingError, match="other data"):
        train(recipe(corpus), out, resume=True)


def test_accumulation_and_checkpointing_change_nothing(finished, corpus, tmp_path):
    train(recipe(corpus, device_batch_size=4, gradient_checkpointing=True), tmp_path / "out")
    assert curve(tmp_path / "out") == pytest.approx(curve(finished[0]), rel=1e-4)


def test_bfloat16_and_experts(corpus, tmp_path):
    experts = {**TINY["model"], "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}
    train(recipe(corpus, precision="bf16", model=experts, saved_dtype="fp16"), tmp_path / "out")
    losses = curve(tmp_path / "out")
    assert losses["eval_loss", 8] < losses["eval_loss", 0]
    assert DogeForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16


def test_dry_run(corpus):
    found = estimate(recipe(corpus))
    assert found.parameters > 0
    assert found.step_seconds > 0
    assert found.total_seconds > 7 * found.step_seconds


def test_files_have_the_permissions_of_new_files(finished, tmp_path):
    """The library that writes the weights leaves them readable by their owner alone."""
    out, _ = finished
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    for path in (*out.glob("*.*"), *out.glob("checkpoints/*/*")):
        assert path.is_dir() or path.stat().st_mode == expected, path


def test_a_checkpoint_is_on_the_disk_before_it_counts(corpus, tmp_path, monkeypatch):
    """Every file of a checkpoint, and of the finished model, is synced before it gets its name, and then the name."""
    log, fsync, rename, replace = [], os.fsync, Path.rename, os.replace

    def note_sync(descriptor):
        log.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(path, target):
        log.append(("name", str(path), [str(file) for file in path.rglob("*")], str(target)))
        return rename(path, target)

    def note_replace(path, target):
        log.append(("name", str(path), [str(path)], str(target)))
        replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_replace)
    train(recipe(corpus, steps=2), tmp_path / "out")
    named = [(index, *entry[1:]) for index, entry in enumerate(log) if entry[0] == "name" and ".unfinished" in entry[1]]
    assert {Path(target).name for *_, target in named} >= {"checkpoint-2", "model.safetensors", "config.json"}
    for index, _, files, target in named:
        assert files
        before = {entry[1] for entry in log[:index] if entry[0] == "sync"}
        assert before >= set(files)
        assert str(Path(target).parent) in [entry[1] for entry in log[index:] if entry[0] == "sync"]


@pytest.mark.parametrize(("has", "precision"), [("bf16", "bf16"), ("fp32", "fp32")])
def test_the_precision_is_the_device_s(corpus, tmp_path, monkeypatch, has, precision):
    """It is said in one line and written down, so that a resumed run goes on in it on any machine."""
    out, screen = tmp_path / "out", io.StringIO()
    monkeypatch.setattr("wm_models.training.run.device_precision", lambda: has)
    train(recipe(corpus, steps=2, precision="auto"), out, console=Console(file=screen, width=200))
    assert f"computes in {'bfloat16' if has == 'bf16' else 'float32'}" in screen.getvalue()
    assert Recipe.load(str(out / "recipe.toml"), {}).precision == precision
    monkeypatch.setattr("wm_models.training.run.device_precision", lambda: "fp32" if has == "bf16" else "bf16")
    train(recipe(corpus, steps=2, precision="auto"), out, resume=True)


def test_progress_within_a_step(corpus, tmp_path, monkeypatch):
    """The first two parts of a step give tokens/s and the time left; a run of days warns."""
    screen = io.StringIO()
    train(recipe(corpus, steps=2), tmp_path / "short", console=Console(file=screen, width=200))
    lines = [line for line in screen.getvalue().splitlines() if "tokens/s" in line]
    assert lines[0].startswith("step 1 of 2, part 1 of 2: ")
    assert lines[1].startswith("step 1 of 2: ")
    assert all(line.endswith(" left") for line in lines)
    assert "warning" not in screen.getvalue()
    clock = itertools.count(step=100_000)
    monkeypatch.setattr("wm_models.training.report.time.monotonic", lambda: float(next(clock)))
    train(recipe(corpus, steps=2), tmp_path / "long", console=Console(file=screen, width=200))
    assert "warning: at this speed the run takes 2.3 days" in screen.getvalue()


def test_a_recipe_s_held_out_can_be_changed(corpus, tmp_path, monkeypatch, capsys):
    """Patterns of a recipe that match nothing in --data name the option, and the option replaces them."""
    from wm_models.training.cli import main

    path = tmp_path / "recipe.toml"
    recipe(corpus, held_out=["absent"], steps=1).save(path)
    command = ["wm-train", "--recipe", str(path), "--data", str(corpus), "--out", str(tmp_path / "out")]
    for given, code in (([], 2), (["--held-out", "held*"], 0)):
        monkeypatch.setattr(sys, "argv", [*command, *given])
        with pytest.raises(SystemExit) as ended:
            main()
        errors = capsys.readouterr().err
        assert ended.value.code == code, errors
        assert code == 0 or "--held-out" in errors
    assert RecipeOptions(held_out=[""], exclude=["", "a"]).changes() == {"held_out": [], "exclude": ["a"]}


@pytest.mark.slow
def test_compiled(corpus, tmp_path, monkeypatch):
    """One graph, no recompilation from the second step on, and eager's curve for 50 steps."""
    inner = Progressing.on_step_end

    def strict(self, *args, **kwargs):
        torch._dynamo.config.error_on_recompile = True
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Progressing, "on_step_end", strict)
    torch._dynamo.reset()
    counters.clear()
    options = {"steps": 50, "evaluate_every": 20, "save_every": 25}
    with torch._dynamo.config.patch(error_on_recompile=False):  # and what `strict` sets is undone
        train(recipe(corpus, compile=True, **options), tmp_path / "compiled")
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 2  # training and evaluation
        train(recipe(corpus, **options), tmp_path / "eager")
    assert curve(tmp_path / "compiled", 50) == pytest.approx(curve(tmp_path / "eager", 50), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes(finished, corpus, tmp_path, sharded):
    """torchrun on two processes: the single process's curve, also when one is killed and both go on."""
    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe(corpus, sharded=sharded).save(path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, sys.executable, "-c", COMMAND, "--recipe", str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and not (out / "checkpoints" / "checkpoint-2").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(out) == pytest.approx(curve(finished[0]), rel=1e-4)


def test_a_preset_whose_tokenizer_does_not_ship_needs_one(corpus):
    with pytest.raises(TrainingError, match=r"doge-100m: its tokenizer, of 128256 ids, does not ship; .*--vocabulary"):
        prepare(recipe(corpus, preset="doge-100m", vocabulary=0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "NOWHERE"], "no such file or directory"),
        (["--data", "EMPTY"], "no text found"),
        (["--data", "BAD"], "bad.txt: is not UTF-8"),
        (["--sequence-length", "4096"], "max_position_embeddings = 64"),
        (["--recipe", "doge-1m"], "doge-20m"),
        (["--preset", "doge-20m"], "--preset"),
        (["--learning-rate", "0"], "learning_rate is 0"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--batch-size", "5", "--device-batch-size", "2"], "batch_size is 5"),
        (["--steps", "many"], "--steps"),
        (["--tokenizer", "EMPTY", "--vocabulary", "0"], "tokenizer.json"),
        (["--out", "CORPUS"], "not empty"),
        (["--out", "MISSING", "--resume"], "no run to resume"),
    ],
)
def test_errors_are_one_line_and_exit_2(corpus, tmp_path, monkeypatch, capsys, arguments, words):
    from wm_models.training.cli import main

    (tmp_path / "bad").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "bad.txt").write_bytes(b"\xff\xfe")
    places = {
        "NOWHERE": "none", "EMPTY": "empty", "BAD": "bad", "MISSING": "missing", "CORPUS": corpus,
    }  # fmt: skip
    path = tmp_path / "recipe.toml"
    recipe(corpus).save(path)
    given = [str(tmp_path / places[word]) if word in places else word for word in arguments]
    options = ["--recipe", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["wm-train", *options, *given])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    assert errors.count("\n") == 1, errors
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_a_preset_trains_with_its_own_recipe():
    from wm_models import PRESETS, preset
    from wm_models.training.recipe import SHIPPED

    for name in PRESETS:
        found = Recipe.load(name, {"steps": 5})
        length = preset(name).max_position_embeddings
        assert (found.preset, found.steps, found.sequence_length) == (name, 5, length)
    assert {*PRESETS, "doge-3m"} <= {path.stem for path in SHIPPED.glob("*.toml")}
