"""One training run, from its recipe to a finished checkpoint directory.

OUT/config.json, model.safetensors, tokenizer…    the finished model, as from_pretrained takes it
OUT/loss.png, training.json                       the curves, and what was measured
OUT/recipe.toml                                   what was asked for
OUT/checkpoints/checkpoint-N                      where --resume goes on
OUT/logs                                          for TensorBoard
"""

import copy
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import get_model_param_count

from runtime.console import Progress
from runtime.host.disk import settle, sync
from wm_models import DogeConfig, preset, shipped_tokenizer
from wm_models.checkpoint.files import one_line, shown
from wm_models.presets import MODELS, has_tokenizer
from wm_models.training.data import Corpus, Measured, read_documents
from wm_models.training.errors import TrainingError
from wm_models.training.recipe import AUTO, DPO, SFT, TEXT, Recipe
from wm_models.training.report import Progressing, bits_per_byte, curves, draw, sample, save_report, text_prompt
from wm_models.training.rows import pack, special_ids
from wm_models.training.tokenizer import train_tokenizer
from wm_models.training.trainer import (
    STAGING,
    RowTrainer,
    WholeTrainer,
    device_precision,
    last_checkpoint,
    parts_of_step,
    sweep,
    training_arguments,
)

log = logging.getLogger(__name__)

SAVED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_LINES = {
    "bf16": "computes in bfloat16, which this device has; --precision fp32 for float32",
    "fp32": "computes in float32: this device has no bfloat16 arithmetic",
}
UNITS = {TEXT: ("documents", "tokens"), SFT: ("chats", "tokens of answers"), DPO: ("preferences", "pairs")}
RECIPE, DIGEST, REPORT, PICTURE = "recipe.toml", "data.sha256", "training.json", "loss.png"


class Prepared(NamedTuple):
    """The data of a run, ready for the model, and what its trainer begins with.

    `begin` makes the trainer, of the run's arguments and callbacks. `train_rows.targets` counts what is learned: the
    tokens that have a label, or the pairs.
    """

    train: int  # documents or chats
    held_out: int
    held_out_bytes: int  # of their text
    tokenizer: PreTrainedTokenizerFast
    config: DogeConfig
    train_rows: Any  # Rows, or Pairs of a dpo run
    held_out_rows: Any
    prompt: list[int]  # of the sample
    note: str  # what is to be said of the data
    begin: Callable[[TrainingArguments, list[TrainerCallback]], WholeTrainer]


def prepare(recipe: Recipe, folder: Path | None = None, shown: bool = False) -> Prepared:
    """Read, split, tokenise and pack a recipe's data. Of `folder` and `shown` see `prepare_text`."""
    return prepare_text(recipe, folder, shown) if recipe.task == TEXT else prepare_tuning(recipe)


def prepare_tuning(recipe: Recipe) -> Prepared:
    """As `prepare`, for the tasks of a base. Raises `TrainingError` where TRL is missing."""
    tuning = _tuning()
    torch.manual_seed(recipe.seed)
    base = tuning.load_base(recipe)
    read = tuning.prepare_chats if recipe.task == SFT else tuning.prepare_pairs
    found = read(recipe, base.tokenizer)
    note = f"{found.left_out:,} chats are longer than {recipe.sequence_length} tokens and left out"
    return Prepared(
        len(found.train),
        len(found.held_out),
        sum(len(document.text.encode()) for document in found.held_out),
        base.tokenizer,
        copy.deepcopy(base.model.config),
        found.train_rows,
        found.held_out_rows,
        found.prompt,
        note if found.left_out else "",
        lambda arguments, callbacks: tuning.tuning_trainer(recipe, base, found, arguments, callbacks),
    )


def _tuning() -> Any:
    """The module that needs TRL."""
    if find_spec("trl") is None:
        raise TrainingError("tuning needs TRL; pip install 'wm-models[tune]'")
    return import_module("wm_models.training.tuning")


def prepare_text(recipe: Recipe, folder: Path | None = None, shown: bool = False) -> Prepared:
    """As `prepare`, for documents and a model with random weights.

    Documents are read one at a time, in three passes or, where a tokenizer is trained, four. So the data may be larger
    than memory. Their tokens lie in files in `folder`, see `pack`. `shown`: with a bar, where it takes long.
    """
    with Progress("reading", shown) as progress:
        corpus = Corpus(
            lambda: progress.track(read_documents(recipe.data, recipe.exclude, recipe.skip_bad)), recipe.held_out
        )
        progress.expect((4 if recipe.vocabulary else 3) * corpus.total)
        tokenizer = _tokenizer(recipe, corpus)
        config = model_config(recipe, tokenizer)
        packed = pack(corpus.training_documents(), tokenizer, recipe.sequence_length, folder)
        train_rows = packed.divisible(recipe.batch_size)
        held_out = Measured(corpus.held_out_documents())
        packed = pack(held_out, tokenizer, recipe.sequence_length, folder)
        held_out_rows = packed.filled(recipe.batch_size)
    prompt = text_prompt(tokenizer, held_out.first)

    def begin(arguments: TrainingArguments, callbacks: list[TrainerCallback]) -> RowTrainer:
        torch.manual_seed(recipe.seed)
        model = MODELS[type(config)](copy.deepcopy(config))  # a trainer changes its model's
        model.config.output_router_logits = model.config.is_moe  # the routers' loss is part of the training loss
        return RowTrainer(model, arguments, train_rows, held_out_rows, tokenizer, callbacks)

    return Prepared(
        corpus.training, corpus.held_out, held_out.size, tokenizer, config, train_rows, held_out_rows, prompt, "", begin
    )


def _tokenizer(recipe: Recipe, corpus: Corpus) -> PreTrainedTokenizerFast:
    """Trained on the corpus, read from the recipe's directory, or the one that ships."""
    if recipe.vocabulary:
        return train_tokenizer((document.text for document in corpus.training_documents()), recipe.vocabulary)
    if recipe.tokenizer:
        if not Path(recipe.tokenizer, "tokenizer.json").exists():
            raise TrainingError(f"{recipe.tokenizer}: has no tokenizer.json; expected a tokenizer's directory")
        return PreTrainedTokenizerFast.from_pretrained(recipe.tokenizer)
    if not has_tokenizer(recipe.preset):
        size = preset(recipe.preset).vocab_size
        raise TrainingError(
            f"{recipe.preset}: its tokenizer, of {size} ids, does not ship; name its directory with --tokenizer, or "
            "train another with --vocabulary"
        )
    return shipped_tokenizer()


def run_arguments(recipe: Recipe, checkpoints: Path, trial: bool) -> TrainingArguments:
    """The recipe in the terms of its task's trainer."""
    if recipe.task == TEXT:
        return training_arguments(recipe, checkpoints, trial)
    return _tuning().tuning_arguments(recipe, checkpoints, trial)


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> DogeConfig:
    """The preset's configuration with the recipe's changes, for this tokenizer."""
    special = special_ids(tokenizer)
    base = preset(recipe.preset)
    values = base.to_dict()
    if unknown := recipe.model.keys() - values.keys():
        raise TrainingError(
            f"model has no {', '.join(map(shown, sorted(unknown)))}; expected fields of {type(base).__name__}"
        )
    values |= {
        **recipe.model,
        "vocab_size": len(tokenizer),
        "bos_token_id": special.begin,
        "eos_token_id": special.end,
        "pad_token_id": special.pad,
    }
    try:
        config = type(base).from_dict(values)
        with torch.device("meta"):
            MODELS[type(base)](config)
    except Exception as error:  # a value the config lets pass fails in the module that uses it, in its own way
        raise TrainingError(f"no model has the recipe's values of model: {one_line(error)[:300]}") from error
    if recipe.sequence_length > config.max_position_embeddings:
        raise TrainingError(
            f"sequence_length is {recipe.sequence_length}; the model takes at most "
            f"max_position_embeddings = {config.max_position_embeddings}"
        )
    return config


def with_precision(recipe: Recipe, begun: Path | None) -> Recipe:
    """The recipe with its precision settled: what `begun`, the recipe of a run to resume, says, or this device's."""
    if recipe.precision != AUTO:
        return recipe
    if begun is not None and begun.exists():
        return replace(recipe, precision=Recipe.load(str(begun), {}).precision)
    return replace(recipe, precision=device_precision())


class Estimate(NamedTuple):
    """What a run will take, from its first two parts of a step."""

    parameters: int
    training_tokens: int
    held_out_tokens: int
    peak_bytes: int
    compile_seconds: float
    step_seconds: float
    total_seconds: float  # without evaluation


def train(recipe: Recipe, out: Path, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train by a recipe into `out`, which must be empty or, to `resume`, hold a run of the same recipe.

    Returns what training.json holds. Under torchrun every process calls it alike. Raises `TrainingError`.
    """
    began = time.monotonic()
    try:
        values = _train(recipe, out, resume, console)
    except TrainingError as error:
        log.warning("refused to train into %s: %s", out, error)
        raise
    log.info("%s finished in %.1f s", out, time.monotonic() - began)
    return values


def _train(recipe: Recipe, out: Path, resume: bool, console: Console | None) -> dict[str, Any]:
    recipe, asked = with_precision(recipe, out / RECIPE if resume else None), recipe.precision
    arguments = run_arguments(recipe, out / "checkpoints", trial=False)
    first = arguments.process_index == 0
    console = console if console and first else Console(quiet=not first)
    if first:
        _check_place(recipe, out, resume)
    where = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    data = prepare(recipe, where, first)
    if first:
        _claim(recipe, out, data.train_rows.digest())
    what, unit = UNITS[recipe.task]
    console.print(
        f"{data.train:,} {what} to train on, {data.train_rows.targets:,} {unit}; "
        f"{data.held_out:,} held out, {data.held_out_rows.targets:,} {unit}"
    )
    if data.note:
        console.print(data.note)
    if asked == AUTO:
        console.print(PRECISION_LINES[recipe.precision])
    checkpoints = out / "checkpoints"
    last, finished = last_checkpoint(checkpoints), checkpoints / f"checkpoint-{recipe.steps}"
    log.info(
        "%s: %s, %d steps, %s, %s, %d documents, %d tokens, process %d of %d",
        out, f"resumed from {last}" if last else "begun", recipe.steps, recipe.preset, recipe.precision,
        data.train, data.train_rows.targets, arguments.process_index, arguments.world_size,
    )  # fmt: skip
    if not finished.exists():
        trainer, progress = _trainer(recipe, arguments, data, console, out / "logs" if first else None)
        try:
            trainer.train(resume_from_checkpoint=last)
        finally:
            progress.bar.stop()
    return _finish(recipe, out, finished, data) if first else {}


def estimate(recipe: Recipe, console: Console | None = None) -> Estimate:
    """Take two parts of a step, of which the first compiles, and reckon what the whole would take."""
    recipe = with_precision(recipe, None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = run_arguments(recipe, Path(folder), trial=True)
        data = prepare(recipe, Path(folder))
        trainer, progress = _trainer(recipe, arguments, data, console or Console(), None)
        trainer.train()
    first, part = progress.times[:2]
    parts = parts_of_step(recipe, arguments)
    return Estimate(
        get_model_param_count(trainer.model),
        data.train_rows.targets,
        data.held_out_rows.targets,
        _peak_bytes(),
        first - part,
        part * parts,
        first + part * (recipe.steps * parts - 1),
    )


def _trainer(
    recipe: Recipe, arguments: Any, data: Prepared, console: Console, logs: Path | None
) -> tuple[WholeTrainer, Progressing]:
    parts = arguments.gradient_accumulation_steps
    rows = arguments.per_device_train_batch_size * arguments.world_size * (2 if recipe.task == DPO else 1)
    progress = Progressing(console, rows * recipe.sequence_length, parts)
    callbacks: list[TrainerCallback] = [progress]
    if logs is not None:
        callbacks.append(TensorBoardCallback(SummaryWriter(str(logs))))
    return data.begin(arguments, callbacks), progress


def _check_place(recipe: Recipe, out: Path, resume: bool) -> None:
    if not resume:
        if out.exists() and (not out.is_dir() or any(path.name != STAGING for path in out.iterdir())):
            raise TrainingError(f"{out}: is not empty; go on with --resume, or choose another --out")
        return
    if not (out / RECIPE).exists():
        raise TrainingError(f"{out}: holds no run to resume; expected its {RECIPE}")
    before, now = Recipe.load(str(out / RECIPE), {}).values(), recipe.values()
    changed = [f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if before[name] != now[name]]
    if changed:
        raise TrainingError(f"{out}: was begun with another recipe: {'; '.join(changed)}")


def _claim(recipe: Recipe, out: Path, digest: str) -> None:
    """Write down what is being trained, or make sure that it is what was."""
    written = out / DIGEST
    if written.exists():
        if written.read_text() != digest:
            raise TrainingError(f"{out}: was begun with other data; the tokens differ, though the recipe is the same")
    else:
        folder = out / STAGING
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DIGEST).write_text(digest)
        recipe.save(folder / RECIPE)
        settle(folder)
        for name in (RECIPE, DIGEST):  # whoever finds a recipe can resume
            os.replace(folder / name, out / name)
        sync(out)
    sweep(out / "checkpoints")


def _finish(recipe: Recipe, out: Path, checkpoint: Path, data: Prepared) -> dict[str, Any]:
    """Make the last checkpoint the finished model; its config.json moves in last, since without it nothing loads."""
    model = MODELS[type(data.config)].from_pretrained(checkpoint, config=data.config).eval()
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    losses = curves(history)
    values = {
        "parameters": model.num_parameters(),
        "steps": recipe.steps,
        "training_loss": losses["loss"][max(losses["loss"])],
        **_measures(recipe, data, history),
        "sample": sample(model, data.tokenizer, data.prompt, recipe.seed),
    }
    folder = out / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.to(SAVED_DTYPES[recipe.saved_dtype]).save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        draw(losses, folder / PICTURE)
        save_report(folder / REPORT, values)
    except Exception as error:  # as where checkpoints are written
        raise TrainingError(f"{out}: the model cannot be written: {error}; then go on with --resume") from error
    settle(folder)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        sync(out)  # what has moved so far
        os.replace(file, out / file.name)
    sync(out)
    folder.rmdir()
    return values


def _measures(recipe: Recipe, data: Prepared, history: list[dict[str, Any]]) -> dict[str, float]:
    """What was measured on the data that are held out, of a base before and after."""
    losses = curves(history)["eval_loss"]
    loss = losses[recipe.steps]
    before = {} if recipe.task == TEXT else {"held_out_loss_before": losses[0]}
    if recipe.task == DPO:
        accuracy = [entry["eval_rewards/accuracies"] for entry in history if "eval_rewards/accuracies" in entry]
        return {"held_out_loss": loss, **before, "held_out_accuracy": accuracy[-1]}
    return {
        "held_out_loss": loss,
        **before,
        "held_out_perplexity": math.exp(loss),
        "held_out_bits_per_byte": bits_per_byte(loss, data.held_out_rows.targets, data.held_out_bytes),
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
