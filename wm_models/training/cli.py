"""The command `wm-train`."""

import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from runtime.console import Version, answered, command, option, run
from wm_models import PRESETS
from wm_models.training.errors import TrainingError
from wm_models.training.recipe import DEFAULT_PRESET, DPO, SFT, SHIPPED, Recipe
from wm_models.training.run import estimate, train

app = typer.Typer(rich_markup_mode=None)
# How the measures of a run are shown, of which a task has some
MEASURED = {
    "held_out_loss": "loss {:.4f}",
    "held_out_loss_before": "before {:.4f}",
    "held_out_perplexity": "perplexity {:.2f}",
    "held_out_bits_per_byte": "{:.3f} bits per byte",
    "held_out_accuracy": "the better answer preferred in {:.1%}",
}
console = Console(highlight=False, soft_wrap=True)
PATTERNS = ("held_out", "exclude")  # values of a recipe that are patterns


Presets = Annotated[
    bool, answered("--list-presets", "Show the names of presets and of recipes and exit.", lambda: "\n".join(_names()))
]


@dataclass(frozen=True)
class RecipeOptions:
    """Values of a recipe that the command line changes; None leaves the recipe's."""

    data: list[str] | None = option(
        None, "A file, folder or glob of text; may be repeated. Default: Python's standard library."
    )
    held_out: list[str] | None = option(
        None, "A pattern of document names to measure on; may be repeated. '': one document in 50."
    )
    exclude: list[str] | None = option(None, "A pattern of document names to leave out; may be repeated. '': none.")
    steps: int | None = option(None, "Optimizer steps.")
    sequence_length: int | None = option(None, "Tokens of a row.")
    batch_size: int | None = option(None, "Rows of a step, over all devices.")
    device_batch_size: int | None = option(None, "The most rows that a device takes at once.")
    learning_rate: float | None = option(None, "The highest of the schedule.")
    base: str | None = option(None, "The checkpoint that --sft or --dpo tunes: a directory, or a model that ships.")
    chat_template: str | None = option(None, "A Jinja file, or chatml. Default: the tokenizer's own.")
    precision: str | None = option(None, "auto, fp32 or bf16. auto: bf16 where the device computes in it, else fp32.")
    tokenizer: str | None = option(None, "A tokenizer's directory. Default: the preset's.")
    vocabulary: int | None = option(None, "Train a tokenizer of so many ids on the data.")
    seed: int | None = option(None, "Of weights and data order.")
    skip_bad: bool | None = option(None, "Leave out files that are not UTF-8.", flag="--skip-bad")
    sharded: bool | None = option(
        None, "Spread the parameters over the processes of torchrun (FSDP2).", flag="--sharded"
    )

    def changes(self) -> dict[str, Any]:
        """What was given, as a recipe has it; an empty pattern stands for no pattern."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: [part for part in value if part] if name in PATTERNS else value for name, value in given.items()}


@dataclass(frozen=True)
class RunOptions:
    """Where a run comes from and goes to, and what it does."""

    sft: list[str] | None = option(
        None, "Tune --base on the answers of chats: a .jsonl file, or more, of messages. May be repeated."
    )
    dpo: list[str] | None = option(
        None, "Tune --base on preferences: a .jsonl file of prompt, chosen and rejected. May be repeated."
    )
    recipe: str | None = option(None, "A .toml file, or the name of a recipe that is shipped.")
    preset: str | None = option(None, "A model's size, with the recipe that is shipped for it.")
    out: Path | None = option(None, "The checkpoint directory to write.")
    resume: bool = option(False, "Go on from the last checkpoint in --out.", flag="--resume")
    dry_run: bool = option(False, "Take two parts of a step, and print what the run would need.", flag="--dry-run")


@command(app, no_args_is_help=True)
def main_command(
    run_options: RunOptions, recipe_options: RecipeOptions, version: Version = False, list_presets: Presets = False
) -> None:
    """Train a model on text, from a folder to a checkpoint that from_pretrained and wm-export take; or tune a
    checkpoint on chats (--sft) or preferences (--dpo).

    What an option does not say the recipe does; every value of a recipe is in the file.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()  # of transformers, which shows one for every checkpoint that it reads
    warnings.filterwarnings("ignore", module="torch")
    recipe, preset, out = run_options.recipe, run_options.preset, run_options.out
    if recipe and preset:
        raise TrainingError("--recipe and --preset are both given; a recipe names its preset")
    if out is None and not run_options.dry_run:
        raise TrainingError("--out is missing; expected the checkpoint directory to write")
    plan = _plan(run_options, recipe_options.changes())
    if run_options.dry_run:
        _print_estimate(plan)
    elif out is not None:
        _print_result(train(plan, out, run_options.resume, console), out)


def _plan(options: RunOptions, changes: dict[str, Any]) -> Recipe:
    """The recipe that the options name, by default the one that ships for their task, with their changes."""
    given = {task: data for task, data in ((SFT, options.sft), (DPO, options.dpo)) if data}
    if len(given) > 1 or (given and (options.preset or "data" in changes)):
        raise TrainingError("--sft, --dpo and --data or --preset are given together; a run has one kind of data")
    if not given:
        return Recipe.load(options.recipe or options.preset or DEFAULT_PRESET, changes)
    ((task, data),) = given.items()
    return Recipe.load(options.recipe or task, {**changes, "task": task, "data": data})


def _names() -> list[str]:
    return sorted({*PRESETS, *(file.stem for file in SHIPPED.glob("*.toml"))})


def _print_estimate(plan: Recipe) -> None:
    found = estimate(plan, Console(quiet=True))
    console.print(
        f"parameters      {found.parameters:,}\n"
        f"data            {found.training_tokens:,} tokens to train on, {found.held_out_tokens:,} held out\n"
        f"tokens seen     {plan.steps * plan.batch_size * plan.sequence_length:,} in {plan.steps:,} steps\n"
        f"peak memory     {found.peak_bytes / 1e9:.2f} GB in this process\n"
        f"compiling       {found.compile_seconds:,.0f} s\n"
        f"a step          {found.step_seconds:.2f} s\n"
        f"the whole run   {found.total_seconds / 3600:.1f} h, without evaluation"
    )


def _print_result(values: dict[str, Any], out: Path) -> None:
    if values:
        console.print(values["sample"], markup=False)
        measured = [form.format(values[name]) for name, form in MEASURED.items() if name in values]
        console.print(f"held out: {', '.join(measured)}\nwritten: {out}")


def main() -> None:
    run(app, "wm-train")
