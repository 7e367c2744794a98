"""The command `wm-run`: generate, classify, chat, serve, evaluate, perplexity, bench."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from runtime.artifact.manifest import MANIFEST
from runtime.batch import classify_file, generate_file
from runtime.bench import BenchOptions, measure, plot, render, table_rows
from runtime.console import Progress, Version, command, run
from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.evaluation.perplexity import PerplexityOptions
from runtime.evaluation.perplexity import perplexity as measure_perplexity
from runtime.evaluation.rendering import show
from runtime.evaluation.scorers import EngineScorer
from runtime.evaluation.tasks import EvaluateOptions, metric_rows
from runtime.evaluation.tasks import evaluate as evaluate_tasks
from runtime.loading import LoadOptions
from runtime.options import option
from runtime.prompts import read_prompts
from runtime.serve.options import ServeOptions, missing_packages
from runtime.speculation.options import GUESSES, METHODS
from runtime.terminal import ChatOptions, talk
from runtime.text.labels import label_scores
from runtime.text.sampling import Sampling

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
Directory = Annotated[Path, typer.Argument(help="An artifact directory.")]


@dataclass(frozen=True)
class SpeculateOptions:
    """How to guess ahead: the arguments of `Engine.speculate`."""

    speculate: str | None = option(
        None, f"Guess tokens ahead and check several a step, for the same answer: {', '.join(METHODS)}."
    )
    draft: Path | None = option(None, "Guess with this artifact, a smaller model over the same tokenizer.")
    guesses: int = option(GUESSES, "Most tokens that are guessed for one step.")

    def __post_init__(self) -> None:
        if self.speculate is not None and self.draft is not None:
            raise RequestError("expected one of --speculate and --draft")

    def load(self, directory: Path, how: LoadOptions) -> Engine:
        """Load an artifact, and its draft, if there is one, in the same way."""
        engine = how.load(directory)
        by = self.speculate if self.draft is None else how.load(self.draft)
        if by is not None:
            engine.speculate(by, self.guesses)
        return engine


@dataclass(frozen=True)
class GenerateOptions:
    """What to continue, and how far."""

    prompt: str | None = option(None, "Text to continue.")
    ids: str | None = option(None, "Token ids to continue, as 1,2,3; prints ids.")
    prompts: Path | None = option(
        None, 'A JSONL file of prompts, {"prompt": …} or {"ids": …} a line; needs --out.'
    )  # fmt: skip
    out: Path | None = option(None, "The JSONL file for --prompts; what it has is not done again.")
    slots: int | None = option(None, "Prompts under way at once. Default: all the artifact has.")
    strict: bool = option(False, "Stop at a line of --prompts that cannot be answered.", flag="--strict")
    max_new_tokens: int = option(128, "Most tokens to add.")
    stop: list[str] | None = option(None, "Stop before this text; may be repeated.")
    json_schema: Path | None = option(None, "A file with a JSON schema that the text must meet.")

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.prompt, self.ids, self.prompts)) != 1:
            raise RequestError("expected one of --prompt, --ids and --prompts")
        of_files = self.slots is not None or self.strict
        if (self.prompts is None) != (self.out is None) or (self.prompts is None and of_files):
            raise RequestError("expected --prompts and --out together, and --slots and --strict with them alone")
        if self.prompt is None and self.stop:
            raise RequestError("--stop is for --prompt; with --prompts, cut the texts afterwards")
        if self.json_schema is not None and (self.prompt is None or self.stop):
            raise RequestError("--json-schema is for --prompt, without --stop")


@dataclass(frozen=True)
class ClassifyOptions:
    """What to classify."""

    text: str | None = option(None, "Text to classify.")
    ids: str | None = option(None, "Token ids to classify, as 1,2,3.")
    texts: Path | None = option(None, 'A JSONL file of texts, {"text": …} or {"ids": …} a line; needs --out.')
    out: Path | None = option(None, "The JSONL file for --texts; what it has is not done again.")
    strict: bool = option(False, "Stop at a line of --texts that cannot be answered.", flag="--strict")

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.text, self.ids, self.texts)) != 1:
            raise RequestError("expected one of --text, --ids and --texts")
        if (self.texts is None) != (self.out is None) or (self.texts is None and self.strict):
            raise RequestError("expected --texts and --out together, and --strict with them alone")


@app.callback()
def wm_run(version: Version = False) -> None:
    """Run an exported model."""


@command(app, no_args_is_help=True)
def generate(
    directory: Directory, options: GenerateOptions, sampling: Sampling, ahead: SpeculateOptions, how: LoadOptions
) -> None:
    """Continue a prompt, whose text streams as it comes, or a file of them."""
    engine = ahead.load(directory, how)
    engine.check_task(classifies=False)
    if options.prompts is not None:
        _generate_file(engine, options, sampling)
    elif options.prompt is not None and options.json_schema is not None:
        schema = options.json_schema.read_text(encoding="utf-8")
        print(engine.generate_json(options.prompt, schema, options.max_new_tokens, sampling=sampling))
    elif options.prompt is not None:
        texts = engine.stream(options.prompt, options.max_new_tokens, stop=options.stop, **asdict(sampling))
        for text in texts:
            print(text, end="", flush=True)
        print()
    else:
        tokens = engine.stream_ids(_parse_ids(options.ids or ""), options.max_new_tokens, **asdict(sampling))
        for index, token in enumerate(tokens):
            print(f",{token}" if index else token, end="", flush=True)
        print()


@command(app, no_args_is_help=True)
def classify(directory: Directory, options: ClassifyOptions, how: LoadOptions) -> None:
    """Print each label with its probability, the most likely first; or classify a file of texts."""
    engine = how.load(directory)
    engine.check_task(classifies=True)
    if options.texts is not None and options.out is not None:
        prompts = read_prompts(engine, options.texts, "text", strict=options.strict)
        answers = classify_file(engine, prompts, options.out, strict=options.strict)
        _show_progress(answers, options.texts, len(prompts))
        return
    logits = engine.classify(_parse_ids(options.ids or "") if options.text is None else options.text)
    scores = label_scores(engine.artifact, logits)[0]
    for index in (-scores).argsort(kind="stable"):
        print(f"{engine.labels[index]}: {scores[index]:.4g}")


@command(app, no_args_is_help=True)
def chat(
    directory: Directory, options: ChatOptions, sampling: Sampling, ahead: SpeculateOptions, how: LoadOptions
) -> None:
    """Talk with a model in the terminal, by its checkpoint's chat template."""
    talk(ahead.load(directory, how), options, sampling)


@command(app, no_args_is_help=True)
def serve(directory: Directory, options: ServeOptions, ahead: SpeculateOptions, how: LoadOptions) -> None:
    """Serve a model over HTTP, to clients of the OpenAI API and at a page of its own."""
    if missing := missing_packages():
        raise RequestError(f"not installed: {', '.join(missing)}; install with pip install 'wm-models[serve]'")
    from runtime.serve.app import create_app
    from runtime.serve.server import bind, serve

    listening = bind(options)
    application = create_app(ahead.load(directory, how), options)
    host, port = listening.getsockname()[:2]
    print(
        f"serving {application.state.service.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True
    )
    serve(application, options, listening)


@command(app, no_args_is_help=True)
def evaluate(directory: Directory, options: EvaluateOptions, how: LoadOptions) -> None:
    """Measure a model on tasks of lm-evaluation-harness."""
    results = evaluate_tasks(how.load(directory), options)
    if options.as_json:
        print(json.dumps(results, indent=2, default=str))
        return
    table = Table("task", "metric", "value")
    for row in metric_rows(results):
        table.add_row(*row)
    Console().print(table)


@command(app, no_args_is_help=True)
def perplexity(
    directory: Directory,
    options: PerplexityOptions,
    how: LoadOptions,
    against: Annotated[
        Path | None, typer.Option(help="Another artifact to compare with, position by position.")
    ] = None,
) -> None:
    """Measure how well a model predicts texts: bits a byte, and how far it is from another artifact.

    A text is read 128 tokens at a time, or token by token where the artifact gives the logits of one token a step. To
    compare with a checkpoint: wm-export perplexity.
    """
    options.check(against is not None)
    if against is not None and not (against / MANIFEST).is_file():
        raise RequestError(f"{against}: is no artifact; compare with a checkpoint by wm-export perplexity")
    other = None if against is None else EngineScorer(how.load(against))
    show(measure_perplexity(how.load(directory), options, other), options)


@command(app, no_args_is_help=True)
def bench(directory: Directory, options: BenchOptions) -> None:
    """Measure start-up, prefill, decode and memory. `wm-export bench` measures baselines beside them."""
    result = measure(directory, options)
    render(result, table_rows(result), options.as_json)
    if options.plot is not None:
        plot(result, options.plot)


def _generate_file(engine: Engine, options: GenerateOptions, sampling: Sampling) -> None:
    assert options.prompts is not None
    assert options.out is not None
    most = engine.graph.max_batch
    slots = most if options.slots is None else options.slots
    if not 1 <= slots <= most:
        raise RequestError(f"--slots is {slots}; this artifact serves 1 to {most}")
    prompts = read_prompts(engine, options.prompts, strict=options.strict)
    answers = generate_file(
        engine, prompts, options.out, options.max_new_tokens, slots, sampling, strict=options.strict
    )
    _show_progress(answers, options.prompts, len(prompts))


def _show_progress(lines: Iterator[int], path: Path, count: int) -> None:
    with Progress(path.name) as progress:
        progress.expect(count)
        for _ in progress.track(lines):
            pass


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--ids is {text[:60]!r}; expected integers with commas between them") from None


def main() -> None:
    run(app, "wm-run")
