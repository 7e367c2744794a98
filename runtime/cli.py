"""The command `wm-run`: generate, bench."""

from pathlib import Path
from typing import Annotated

import typer

from .console import run
from .engine import load
from .errors import RequestError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Run an exported model.")
Directory = Annotated[Path, typer.Argument(help="An artifact directory.")]
PublicKey = Annotated[Path | None, typer.Option(help="Load only what the holder of this Ed25519 key (PEM) signed.")]
Backend = Annotated[str, typer.Option(help="auto, onnx (ONNX Runtime), or tensorrt (the artifact's engine).")]
Provider = Annotated[str, typer.Option(help="What ONNX Runtime computes on: auto, cpu, cuda or tensorrt.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with. Default: the physical cores.")]


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, as 1,2,3; prints ids.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that make up this share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    backend: Backend = "auto",
    provider: Provider = "cpu",
    threads: Threads = None,
    public_key: PublicKey = None,
    allow_unverified: Annotated[bool, typer.Option("--allow-unverified", help="Load what failed its checks.")] = False,
) -> None:
    """Continue a prompt; text streams as it comes."""
    if (prompt is None) == (ids is None):
        raise RequestError("expected either --prompt or --ids")
    engine = load(
        directory, backend, provider=provider, threads=threads, allow_unverified=allow_unverified, public_key=public_key
    )
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if prompt is not None:
        for text in engine.stream(prompt, max_new_tokens, stop=stop, **sampling):
            print(text, end="", flush=True)
        print()
    else:
        tokens = engine.stream_ids(_parse_ids(ids or ""), max_new_tokens, **sampling)
        for index, token in enumerate(tokens):
            print(f",{token}" if index else token, end="", flush=True)
        print()


@app.command()
def bench(
    directory: Directory,
    against: Annotated[
        list[str] | None, typer.Option(help="A rival to run beside it: transformers or torch-compile.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    rounds: Annotated[int, typer.Option(help="Measurements; the median counts.")] = 5,
    backend: Backend = "auto",
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure prefill, decode and memory, beside the floor of the model's linear layers and beside rivals."""
    from .bench import measure, render

    result = measure(directory, against or [], prompt_length, new_tokens, rounds, threads, backend, provider)
    render(result, as_json)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--ids is {text!r}; expected integers with commas between them") from None


def main() -> None:
    run(app, "wm-run")
