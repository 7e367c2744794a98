"""The command `wm-train`."""

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from runtime.console import run
from wm_models.training.errors import TrainingError
from wm_models.training.recipe import Recipe
from wm_models.training.run import estimate, train

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def main_command(
    recipe: Annotated[str | None, typer.Option(help="A .toml file, or the name of a recipe that is shipped.")] = None,
    preset: Annotated[str | None, typer.Option(help="A model's size, with the recipe that is shipped for it.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A file, folder or glob of text; may be repeated. Default: Python's standard library."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The checkpoint directory to write.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step, over all devices.")] = None,
    device_batch_size: Annotated[int | None, typer.Option(help="The most rows that a device takes at once.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest of the schedule.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer's directory. Default: the preset's.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Train a tokenizer of so many ids on the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data order.")] = None,
    skip_bad: Annotated[bool | None, typer.Option("--skip-bad", help="Leave out files that are not UTF-8.")] = None,
    sharded: Annotated[
        bool | None, typer.Option("--sharded", help="Spread the parameters over the processes of torchrun (FSDP2).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take two steps, and print what the run would need.")
    ] = False,
) -> None:
    """Train a model on text, from a folder to a checkpoint that from_pretrained and wm-export take.

    What an option does not say the recipe does; every value of a recipe is in the file.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")
    if recipe and preset:
        raise TrainingError("--recipe and --preset are both given; a recipe names its preset")
    if out is None and not dry_run:
        raise TrainingError("--out is missing; expected the checkpoint directory to write")
    options: dict[str, Any] = {
        "data": data, "steps": steps, "sequence_length": sequence_length, "batch_size": batch_size,
        "device_batch_size": device_batch_size, "learning_rate": learning_rate, "precision": precision,
        "tokenizer": tokenizer, "vocabulary": vocabulary, "seed": seed, "skip_bad": skip_bad, "sharded": sharded,
    }  # fmt: skip
    chosen = {name: value for name, value in options.items() if value is not None}
    plan = Recipe.load(recipe or preset or "doge-20m", chosen)
    if dry_run:
        _print_estimate(plan)
    elif out is not None:
        _print_result(train(plan, out, resume, console), out)


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
        console.print(
            f"held out: perplexity {values['held_out_perplexity']:.2f}, "
            f"{values['held_out_bits_per_byte']:.3f} bits per byte\nwritten: {out}"
        )


def main() -> None:
    run(app, "wm-train")
