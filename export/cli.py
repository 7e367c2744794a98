"""The command `wm-export`: a subcommand for each target, and verify, sign, inspect, perplexity, bench, roofline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export import __version__
from export.api import sign, verify
from export.bench import report, roofline
from export.bench.measure import BaselineOptions, measure
from export.bench.roofline import RooflineOptions
from export.errors import ExportError, VerificationError
from export.inspection import inspect_artifact
from export.targets import base
from export.targets.base import Target, write_artifact
from export.targets.registry import TARGETS
from export.terminal import shown_progress
from export.verification.comparison import Comparison, worst
from export.verification.eager_scorer import EagerScorer
from export.verification.record import read_origin
from runtime.artifact.manifest import MANIFEST
from runtime.bench import BenchOptions, render
from runtime.console import command, option, run
from runtime.evaluation.perplexity import PerplexityOptions, perplexity
from runtime.evaluation.rendering import show
from runtime.loading import LoadOptions
from wm_models import PRESETS
from wm_models.shipped import SHIPPED_CHECKPOINTS, TRAINED

console = Console(highlight=False)

Directory = Annotated[Path, typer.Argument(help="An artifact directory.")]
Out = Annotated[Path, typer.Option(help="The artifact directory to write.")]


@dataclass(frozen=True)
class Writing:
    """What every target takes besides its own options."""

    seed: int = option(0, "Of a preset's random weights.")
    force: bool = option(False, "Replace what --out holds, once the new artifact is whole.", flag="--force")


def make_app() -> typer.Typer:
    """The command line over the targets that are registered now."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    app.callback(help="Export models and compare them with the eager model.")(_general_options)
    for target in TARGETS.values():
        _add_target(app, target)
    for function in (_verify, _sign, _inspect, _perplexity, _bench, _roofline):
        command(app, function.__name__.removeprefix("_"))(function)
    return app


def _print_and_exit(text: str) -> None:
    console.print(text)
    raise typer.Exit


def _general_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            help="Show the version and exit.",
            callback=lambda given: _print_and_exit(f"wm-models {__version__}") if given else None,
        ),
    ] = False,
    list_presets: Annotated[
        bool,
        typer.Option(
            "--list-presets",
            is_eager=True,
            help="Show the names that stand for a model and exit.",
            callback=lambda given: _print_and_exit("\n".join([*SHIPPED_CHECKPOINTS, *PRESETS])) if given else None,
        ),
    ] = False,
) -> None:
    """Options before a subcommand: each is answered by its own callback."""


def _add_target(app: typer.Typer, target: Target[Any]) -> None:
    def write(out: Out, options: Any, writing: Writing, source: str = TRAINED) -> None:
        with shown_progress() as progress:
            written = write_artifact(
                target, source, out, options, seed=writing.seed, force=writing.force, progress=progress
            )
        if written.comparisons:
            _conclude(written.comparisons, out)
        for line in target.summary(out, written.manifest):
            console.print(line, soft_wrap=True)

    write.__doc__ = target.help
    write.__annotations__["options"] = target.options
    write.__annotations__["source"] = Annotated[str, typer.Argument(help=target.source_help)]
    command(app, target.name)(write)


def _verify(
    directory: Directory,
    source: Annotated[str | None, typer.Option(help="The checkpoint, where it is not what the artifact names.")] = None,
) -> None:
    """Compare an artifact with its eager model again."""
    with shown_progress() as progress:
        comparisons = verify(directory, source, progress=progress)
    _conclude(comparisons, directory)


def _sign(directory: Directory, key: Annotated[Path, typer.Option(help="An Ed25519 private key's PEM file.")]) -> None:
    """Sign an artifact, for those who load it with the public key."""
    console.print(f"signed: {sign(directory, key)}", soft_wrap=True)


def _inspect(directory: Directory) -> None:
    """Show an artifact's inputs, outputs, operators and sizes."""
    inspection = inspect_artifact(directory)
    console.print(inspection.summary)
    _print_tables(inspection.tables)


def _print_tables(tables: list[base.Table]) -> None:
    for title, columns, rows in tables:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _perplexity(
    directory: Directory,
    options: PerplexityOptions,
    how: LoadOptions,
    against: Annotated[
        str | None, typer.Option(help="The checkpoint, preset or shipped model. Default: what the artifact names.")
    ] = None,
) -> None:
    """Measure how far an artifact's predictions of texts are from the eager model's.

    wm-run perplexity compares two artifacts, without torch.
    """
    options.check(comparing=True)
    if against is not None and (Path(against) / MANIFEST).is_file():
        raise ExportError(f"{against}: is an artifact; compare two of them by wm-run perplexity")
    engine = how.load(directory)
    origin = read_origin(engine.artifact, against)
    show(perplexity(engine, options, EagerScorer(origin.source, origin.seed)), options)


def _bench(directory: Directory, options: BenchOptions, baselines: BaselineOptions) -> None:
    """Measure an artifact beside the floor of its linear layers and beside baselines."""
    result = measure(directory, options, baselines)
    render(result, report.table_rows(result), options.as_json)
    if options.plot is not None:
        report.plot(result, options.plot)


def _roofline(directory: Directory, options: RooflineOptions) -> None:
    """Count what a decode step reads and computes, and the tokens/s that cards' memory allows."""
    found = roofline.roofline(directory, options.batch, options.context)
    if options.as_json:
        print(json.dumps(roofline.as_json(found), indent=2))
    else:
        _print_tables(roofline.tables(found))


def _conclude(comparisons: list[Comparison], directory: Path) -> None:
    if not all(comparison.passed for comparison in comparisons):
        raise VerificationError(f"{directory}: {worst(comparisons)}; it loads only with allow_unverified=True")
    positions = sum(comparison.positions for comparison in comparisons)
    console.print(f"verified: {directory}: {len(comparisons)} comparisons, {positions} positions", soft_wrap=True)


def main() -> None:
    run(make_app(), "wm-export", failures=(VerificationError,))
