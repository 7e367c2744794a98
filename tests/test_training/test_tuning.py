"""Tuning on chats and on preferences: the losses are TRL's and those by hand, and a run is a run like the others."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, randomise
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from test_training.test_run import curve
from wm_models import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM, shipped_checkpoint
from wm_models.training import Recipe, TrainingError, train
from wm_models.training.run import estimate, prepare
from wm_models.training.tuning import load_base

STEPS = 4
VALUES = {
    "steps": STEPS,
    "sequence_length": 96,
    "batch_size": 4,
    "device_batch_size": 2,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "precision": "fp32",
    "compile": False,
    "log_every": 1,
    "evaluate_every": 2,
    "save_every": 2,
    "new_tokens": ["<|im_start|>", "<|im_end|>"],
    "chat_template": "chatml",
    "held_out": ["*:3", "*:9", "*:14"],
}


def question(number):
    return {"role": "user", "content": f"Write a function that returns {number}."}


def answer(number):
    return {"role": "assistant", "content": f"def f():\n    return {number}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    model = DogeForCausalLM(DogeConfig(**{**SMALL, "vocab_size": len(tokenizer), "num_hidden_layers": 2}))
    randomise(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"messages": [question(number), answer(number)]} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": [question(number)], "chosen": [answer(number)], "rejected": [answer(-number)]}
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["sft", "dpo"])
def recipe(request, base, chats, pairs):
    data = {"sft": chats, "dpo": pairs}[request.param]
    rate = {"sft": 3e-3, "dpo": 3e-4}[request.param]
    return Recipe(**{**VALUES, "task": request.param, "base": str(base), "data": [str(data)], "learning_rate": rate})


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / recipe.task
    return out, train(recipe, out)


def test_what_a_run_leaves(recipe, finished):
    out, values = finished
    names = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "training.json",
        "recipe.toml",
    }
    assert names <= {path.name for path in out.iterdir()}
    assert values["held_out_loss"] < values["held_out_loss_before"]
    assert ("held_out_accuracy" in values) == (recipe.task == "dpo")
    losses = curve(out, STEPS)
    assert sorted(step for key, step in losses if key == "eval_loss") == [0, 2, 4]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = DogeForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 3074
    assert model.config.use_cache
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.eos_token_id == ends
    assert tokenizer.chat_template
    assert train(recipe, out, resume=True) == values


def test_killed_and_resumed(recipe, finished, tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from wm_models.training import Recipe, train
from wm_models.training.tuning import ChatTrainer, PreferenceTrainer
for kind in (ChatTrainer, PreferenceTrainer):
    def deadly(self, *args, inner=kind.compute_loss, **kwargs):
        if self.state.global_step == 3 and self.model.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args, **kwargs)
    kind.compute_loss = deadly
train(Recipe(**{recipe.values()!r}), Path(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    values = train(recipe, tmp_path / "out", resume=True)
    assert curve(tmp_path / "out", STEPS) == curve(finished[0], STEPS)
    assert values == finished[1]


def by_hand(model, ids, first):
    """Log-probabilities of the tokens from `first` on, summed, and how many there are, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    found = F.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[1:, None])[first - 1 :, 0]
    return found.sum(), len(found)


def tokens_of(tokenizer, messages):
    """A chat's tokens up to the end of its last answer, and how many of them are the prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return [*prompt, *tokenizer(messages[-1]["content"], add_special_tokens=False).input_ids, end], len(prompt)


def test_only_answers_have_loss(base, chats, tmp_path):
    """The held-out loss of the base is the mean over the answers' tokens, by hand and in float64."""
    recipe = Recipe(**{**VALUES, "task": "sft", "base": str(base), "data": [str(chats)], "steps": 1})
    values = train(recipe, tmp_path / "out")
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_base(recipe)
    model = model.double().eval()
    total, count = 0.0, 0
    for number in (2, 8, 13):  # lines 3, 9 and 14
        log_probs, tokens = by_hand(model, *tokens_of(tokenizer, [question(number), answer(number)]))
        total, count = total - log_probs, count + tokens
    assert values["held_out_loss_before"] == pytest.approx(float(total / count), rel=1e-5)


def test_one_step_is_trl_s_own(base, chats, tmp_path):
    """All chats in a step: TRL's trainer, left to read, mask and pad them by itself, has the same loss."""
    recipe = Recipe(
        **{**VALUES, "task": "sft", "base": str(base), "data": [str(chats)], "steps": 1, "sequence_length": 384,
           "batch_size": 4, "device_batch_size": 4, "held_out": ["*:3"]}
    )  # fmt: skip
    rows = prepare(recipe).train_rows
    assert len(rows) == 4  # the last row of fewer chats, or the same again
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_base(recipe)
    kept = [index for index in range(24) if index != 2]
    options = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1}
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(tmp_path), assistant_only_loss=True, per_device_eval_batch_size=23, max_length=None, **options
        ),
        train_dataset=Dataset.from_list([{"messages": [question(index), answer(index)]} for index in kept]),
        eval_dataset=Dataset.from_list([{"messages": [question(index), answer(index)]} for index in kept]),
        processing_class=tokenizer,
    )  # fmt: skip
    expected = trainer.evaluate()["eval_loss"]
    torch.manual_seed(recipe.seed)
    ours = load_base(recipe).model.eval()
    items = [rows[row] for row in range(len(rows))]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        assert ours(**batch, use_cache=False).loss.item() == pytest.approx(expected, rel=1e-5)


def test_preferences_are_trl_s_own(base, pairs, tmp_path):
    """TRL's trainer on pairs that it pads by itself begins with the same loss and margin as a run, log 2 and none."""
    values = {**VALUES, "task": "dpo", "base": str(base), "data": [str(pairs)], "learning_rate": 3e-4}
    found = train(Recipe(**values), tmp_path / "out")
    assert found["held_out_loss_before"] == pytest.approx(0.693147, abs=1e-5)
    tuned = DogeForCausalLM.from_pretrained(tmp_path / "out").double().eval()
    torch.manual_seed(0)
    before, tokenizer = load_base(Recipe(**values))
    before, losses = before.double().eval(), []
    for number in (2, 8, 13, 2):  # the batch of four repeats the first of three pairs
        margins = []
        for sign in (1, -1):
            messages = [question(number), answer(sign * number)]
            first = tokens_of(tokenizer, messages)[1]
            ids = tokenizer.apply_chat_template(messages)["input_ids"]  # TRL learns what follows an answer's end too
            margins.append(by_hand(tuned, ids, first)[0] - by_hand(before, ids, first)[0])
        losses.append(-F.logsigmoid(0.1 * (margins[0] - margins[1])))
    assert found["held_out_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_cheems_is_tuned_too(chats, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    CheemsForCausalLM(CheemsConfig(**{**SMALL, "vocab_size": len(tokenizer), "num_hidden_layers": 8})).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = Recipe(**{**VALUES, "task": "sft", "base": str(tmp_path / "base"), "data": [str(chats)], "steps": 2})
    values = train(recipe, tmp_path / "out")
    assert values["held_out_loss"] < values["held_out_loss_before"]
    assert type(CheemsForCausalLM.from_pretrained(tmp_path / "out")) is CheemsForCausalLM


@pytest.mark.slow
def test_compiled_as_eager(base, chats, tmp_path):
    """`compile` changes no loss of tuning on chats."""
    curves = []
    for compiled in (False, True):
        values = {**VALUES, "task": "sft", "base": str(base), "data": [str(chats)], "steps": 2, "compile": compiled}
        out = tmp_path / str(compiled)
        train(Recipe(**values), out)
        curves.append(curve(out, 2))
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_dry_run(recipe):
    found = estimate(recipe)
    assert found.parameters > 0
    assert found.total_seconds > found.step_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sft", "CHATS"], "expected a base"),
        (["--sft", "CHATS", "--dpo", "PAIRS", "--base", "BASE"], "one kind of data"),
        (["--sft", "CHATS", "--data", "CHATS", "--base", "BASE"], "one kind of data"),
        (["--sft", "NOWHERE", "--base", "BASE", "--chat-template", "PLAIN", "--sequence-length", "96"], "no such file"),
        (["--sft", "CHATS", "--base", "NOWHERE"], "no such directory, and no model that ships"),
        (["--sft", "CHATS", "--base", "BASE", "--sequence-length", "96"], "no chat template; name one with"),
        (["--sft", "CHATS", "--base", "BASE", "--chat-template", "none"], "one of chatml"),
        (["--sft", "CHATS", "--base", "BASE", "--chat-template", "chatml"], "max_position_embeddings = 512"),
        (["--sft", "PAIRS", "--base", "BASE", "--chat-template", "PLAIN", "--sequence-length", "96"], "pairs.jsonl:1"),
        (["--sft", "CHATS", "--base", "BASE", "--chat-template", "PLAIN", "--sequence-length", "8"], "0 chats fit"),
        (["--sft", "CHATS", "--base", "BASE", "--vocabulary", "400"], "vocabulary is 400; task sft has no"),
        (["--recipe", "PRESET"], "preset is 'doge-60m'; task sft has no"),
        (["--dpo", "CHATS", "--base", "BASE", "--chat-template", "PLAIN", "--sequence-length", "96"], "prompt is"),
        (["--dpo", "PAIRS", "--base", "BASE", "--sharded"], "sharded is true"),
        (["--base", "BASE"], "task is text and base"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_2(base, chats, pairs, tmp_path, monkeypatch, capsys, arguments, words):
    from wm_models.training.cli import main

    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for message in messages %}{{ message.content + eos_token }}{% endfor %}")
    preset = tmp_path / "preset.toml"
    preset.write_text(f'task = "sft"\nbase = "{base}"\ndata = ["{chats}"]\npreset = "doge-60m"\n')
    places = {
        "PRESET": preset,
        "CHATS": chats,
        "PAIRS": pairs,
        "BASE": base,
        "NOWHERE": tmp_path / "nowhere",
        "PLAIN": plain,
    }
    given = [str(places.get(word, word)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["wm-train", "--out", str(tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    assert errors.strip().count("\n") == 0, errors
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_two_processes(base, chats, tmp_path):
    """Chats under torchrun: the single process's curve."""
    recipe = Recipe(**{**VALUES, "task": "sft", "base": str(base), "data": [str(chats)]})
    train(recipe, tmp_path / "one")
    recipe.save(tmp_path / "recipe.toml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, "-c", "from wm_models.training.cli import main; main()"]
    done = subprocess.run(
        [*launch, *command, "--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path / "two", STEPS) == pytest.approx(curve(tmp_path / "one", STEPS), rel=1e-4)


def test_a_missing_trl_is_named(monkeypatch, base, chats):
    monkeypatch.setattr("wm_models.training.run.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install 'wm-models\[tune\]'"):
        prepare(Recipe(**{**VALUES, "task": "sft", "base": str(base), "data": [str(chats)]}))
