"""The command `wm-run`: generate, classify, serve, bench."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from runtime.backends.registry import backend_names
from runtime.bench import BenchOptions, measure, plot, render, table_rows
from runtime.console import command, run
from runtime.engine import Engine, load
from runtime.errors import RequestError
from runtime.serve.options import ServeOptions, missing_packages
from runtime.text.labels import label_scores
from runtime.text.sampling import Sampling

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Run an exported model.")
Directory = Annotated[Path, typer.Argument(help="An artifact directory.")]
PublicKey = Annotated[Path | None, typer.Option(help="Load only what the holder of this Ed25519 key (PEM) signed.")]
Backend = Annotated[str, typer.Option(help=f"What to run on: {', '.join(backend_names())}.")]
Device = Annotated[int | None, typer.Option(help="The GPU's index. Default: the first.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with. Default: the physical cores.")]
Unverified = Annotated[bool, typer.Option("--allow-unverified", help="Load what failed its checks.")]


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, as 1,2,3; prints ids.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='A JSONL file of prompts, {"prompt": …} or {"ids": …} a line; needs --out.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The JSONL file for --prompts; what it has is not done again.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Prompts under way at once. Default: all the artifact has.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens that make up this share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    backend: Backend = "auto",
    device: Device = None,
    threads: Threads = None,
    public_key: PublicKey = None,
    allow_unverified: Unverified = False,
) -> None:
    """Continue a prompt, whose text streams as it comes, or a file of them."""
    if sum(given is not None for given in (prompt, ids, prompts)) != 1:
        raise RequestError("expected one of --prompt, --ids and --prompts")
    if (prompts is None) != (out is None) or (prompts is None and slots is not None):
        raise RequestError("expected --prompts and --out together, and --slots with them alone")
    if prompts is not None and stop:
        raise RequestError("--stop is for --prompt; with --prompts, cut the texts afterwards")
    engine = load(
        directory, backend, device=device, threads=threads, allow_unverified=allow_unverified, public_key=public_key
    )
    engine.check_task(classifies=False)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if prompts is not None and out is not None:
        _generate_file(engine, prompts, out, max_new_tokens, slots, Sampling(**sampling))
    elif prompt is not None:
        for text in engine.stream(prompt, max_new_tokens, stop=stop, **sampling):
            print(text, end="", flush=True)
        print()
    else:
        tokens = engine.stream_ids(_parse_ids(ids or ""), max_new_tokens, **sampling)
        for index, token in enumerate(tokens):
            print(f",{token}" if index else token, end="", flush=True)
        print()


@app.command()
def classify(
    directory: Directory,
    text: Annotated[str | None, typer.Option(help="Text to classify.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to classify, as 1,2,3.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help='A JSONL file of texts, {"text": …} or {"ids": …} a line; needs --out.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The JSONL file for --texts; what it has is not done again.")] = None,
    backend: Backend = "auto",
    device: Device = None,
    threads: Threads = None,
    public_key: PublicKey = None,
    allow_unverified: Unverified = False,
) -> None:
    """Print each label with its probability, the most likely first; or classify a file of texts."""
    if sum(given is not None for given in (text, ids, texts)) != 1:
        raise RequestError("expected one of --text, --ids and --texts")
    if (texts is None) != (out is None):
        raise RequestError("expected --texts and --out together")
    engine = load(
        directory, backend, device=device, threads=threads, allow_unverified=allow_unverified, public_key=public_key
    )
    engine.check_task(classifies=True)
    if texts is not None and out is not None:
        _classify_file(engine, texts, out)
        return
    logits = engine.classify(_parse_ids(ids or "") if text is None else text)
    scores = label_scores(engine.artifact, logits)[0]
    for index in (-scores).argsort(kind="stable"):
        print(f"{engine.labels[index]}: {scores[index]:.4g}")


@command(app)
def serve(
    directory: Directory,
    options: ServeOptions,
    backend: Backend = "auto",
    device: Device = None,
    threads: Threads = None,
    public_key: PublicKey = None,
    allow_unverified: Unverified = False,
) -> None:
    """Serve a model over HTTP, to clients of the OpenAI API and at a page of its own."""
    if missing := missing_packages():
        raise RequestError(f"not installed: {', '.join(missing)}; install with pip install 'wm-models[serve]'")
    from runtime.serve.app import create_app
    from runtime.serve.server import bind, serve

    listening = bind(options)
    engine = load(
        directory, backend, device=device, threads=threads, allow_unverified=allow_unverified, public_key=public_key
    )
    application = create_app(engine, options)
    host, port = listening.getsockname()[:2]
    print(
        f"serving {application.state.service.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True
    )
    serve(application, options, listening)


@command(app)
def bench(directory: Directory, options: BenchOptions) -> None:
    """Measure start-up, prefill, decode and memory. `wm-export bench` measures baselines beside them."""
    result = measure(directory, options)
    render(result, table_rows(result), options.as_json)
    if options.plot is not None:
        plot(result, options.plot)


def _generate_file(
    engine: Engine, path: Path, out: Path, max_new_tokens: int, slots: int | None, sampling: Sampling
) -> None:
    from runtime.batch import generate_file, read_prompts

    prompts, most = read_prompts(engine, path), engine.graph.max_batch
    if slots is not None and not 1 <= slots <= most:
        raise RequestError(f"--slots is {slots}; this artifact serves 1 to {most}")
    _show_progress(generate_file(engine, prompts, out, max_new_tokens, slots or most, sampling), path, len(prompts))


def _classify_file(engine: Engine, path: Path, out: Path) -> None:
    from runtime.batch import classify_file, read_prompts

    prompts = read_prompts(engine, path, key="text")
    _show_progress(classify_file(engine, prompts, out), path, len(prompts))


def _show_progress(lines: Iterator[int], path: Path, count: int) -> None:
    for _ in track(lines, path.name, count, console=Console(stderr=True)):
        pass


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--ids is {text!r}; expected integers with commas between them") from None


def main() -> None:
    run(app, "wm-run")
