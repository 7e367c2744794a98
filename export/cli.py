"""The command `wm-export`: onnx, tensorrt, verify, sign, inspect, bench."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from export.bench import report
from export.bench.measure import BaselineOptions, measure
from export.errors import VerificationError
from export.package.inspection import inspect_artifact
from export.package.signing import sign
from export.targets.onnx_graph import export_onnx
from export.targets.tensorrt import CHUNK, build_tensorrt
from export.verification.compare import Comparison, verify, worst
from runtime.bench import BenchOptions, render
from runtime.console import command, run
from wm_models.shipped import TRAINED

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Export models and check them."
)
console = Console(highlight=False)

Directory = Annotated[Path, typer.Argument(help="An artifact directory.")]
Out = Annotated[Path, typer.Option(help="The artifact directory to write.")]
Seed = Annotated[int, typer.Option(help="Of a preset's random weights.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what --out holds, once the new one is whole.")]


@app.command()
def onnx(
    out: Out,
    source: Annotated[
        str, typer.Argument(help="A checkpoint directory, the shipped model, or a preset's name for random weights.")
    ] = TRAINED,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    quantize: Annotated[str | None, typer.Option(help="Weights as int8 or int4, in blocks.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Weights to a scale at most: 16 to 128. Default: 128 with int8, 32 with int4.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a slot holds. Default: all RoPE allows.")] = None,
    max_batch: Annotated[int, typer.Option(help="Most slots a step serves.")] = 8,
    logits: Annotated[str, typer.Option(help="Logits of the last real token, or of all.")] = "last",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write an ONNX artifact and verify it against the eager model."""
    with console.status("") as status:
        verdicts = export_onnx(
            source, out, dtype=dtype, quantize=quantize, block_size=block_size, max_length=max_length,
            max_batch=max_batch, logits=logits, seed=seed, force=force,
            stage=lambda name: status.update(f"{name} …"), report=_print_verdict,
        )  # fmt: skip
    _conclude(verdicts, out)


@app.command()
def tensorrt(
    source: Annotated[str, typer.Argument(help="An artifact, a checkpoint directory, or a preset's name.")],
    out: Out,
    builder: Annotated[str, typer.Option(help="auto, tensorrt (needs a GPU) or tensorrt-rtx (needs none).")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Default: fp32, or the artifact's.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most slots a step serves. Default: 8, or as exported.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a slot holds. Default: as many as it can.")] = None,
    chunk: Annotated[int, typer.Option(help="Most tokens a slot takes in one step.")] = CHUNK,
    compute_capability: Annotated[
        str, typer.Option(help="GPUs to build for, as 8.6,8.9. Default: all from 8.0 on, or the GPU at hand.")
    ] = "",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Build a TensorRT engine into an artifact, and check its layers."""
    with console.status("") as status:
        engine = build_tensorrt(
            source, out, builder=builder, dtype=dtype, max_batch=max_batch, max_length=max_length, chunk=chunk,
            compute_capability=[name for name in compute_capability.split(",") if name], seed=seed, force=force,
            stage=lambda name: status.update(f"{name} …"), report=_print_verdict,
        )  # fmt: skip
    layers, build = engine["layers"], engine["build"]
    for index, profile in enumerate(engine["profiles"]):
        fused = sum(attention["fused"][index] for attention in layers["attention"])
        console.print(
            f"{profile['name']}: batch 1 to {profile['batch'][2]}, {profile['sequence'][0]} to "
            f"{profile['sequence'][2]} tokens, attention fused in {fused} of {len(layers['attention'])} layers",
            soft_wrap=True,
        )
    console.print(
        f"built: {out / engine['file']}: {engine['builder']} {engine['version']} for compute capability "
        f"{', '.join(engine['compute_capabilities'])}; {build['bytes'] / 1e6:.0f} MB in {build['seconds']:.1f} s and "
        f"{build['peak_bytes'] / 1e9:.1f} GB; {len(layers['cache_updates'])} caches updated in place, "
        f"{len(layers['rotary'])} rotary layers",
        soft_wrap=True,
    )


@app.command("verify")
def verify_command(
    directory: Directory,
    source: Annotated[str | None, typer.Option(help="The checkpoint, where it has moved since the export.")] = None,
) -> None:
    """Compare an artifact with its eager model again."""
    with console.status("comparing with the eager model …"):
        verdicts = verify(directory, source, _print_verdict)
    _conclude(verdicts, directory)


@app.command("sign")
def sign_command(
    directory: Directory,
    key: Annotated[Path, typer.Option(help="An Ed25519 private key's PEM file.")],
) -> None:
    """Sign an artifact, for those who load it with the public key."""
    console.print(f"signed: {sign(directory, key)}", soft_wrap=True)


@app.command("inspect")
def inspect_command(directory: Directory) -> None:
    """Show an artifact's inputs, outputs, operators and sizes."""
    report = inspect_artifact(directory)
    console.print(report.summary)
    for title, columns, rows in report.tables:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


@command(app)
def bench(directory: Directory, options: BenchOptions, baselines: BaselineOptions) -> None:
    """Measure an artifact beside the floor of its linear layers and beside baselines."""
    result = measure(directory, options, baselines)
    render(result, report.table_rows(result), options.as_json)
    if options.plot is not None:
        report.plot(result, options.plot)


def _print_verdict(verdict: Comparison) -> None:
    limit = f" (limit {verdict.difference_limit:.1e})" if verdict.difference_limit is not None else ""
    kl_limit = f" (limit {verdict.kl_limit:.0e})" if verdict.kl_limit is not None else ""
    console.print(
        f"{'ok  ' if verdict.passed else 'FAIL'} {verdict.case}: max |Δlogit| {verdict.max_difference:.1e}{limit}, "
        f"mean KL {verdict.mean_kl:.1e}{kl_limit}, argmax agreement {verdict.argmax_agreement:.2%}",
        soft_wrap=True,
    )


def _conclude(verdicts: list[Comparison], directory: Path) -> None:
    if not all(verdict.passed for verdict in verdicts):
        raise VerificationError(f"{directory}: {worst(verdicts)}; it loads only with allow_unverified=True")
    positions = sum(verdict.positions for verdict in verdicts)
    console.print(f"verified: {directory}: {len(verdicts)} comparisons, {positions} positions", soft_wrap=True)


def main() -> None:
    run(app, "wm-export", failures=(VerificationError,))
