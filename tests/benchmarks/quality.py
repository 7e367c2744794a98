"""How good each artifact of a model is: bits per byte, divergence from the eager model, and tasks.

python tests/benchmarks/quality.py [--documents 200] [--source doge-3m]

Texts are the files of the standard library that the shipped model never saw. The tasks are those of
tests/test_evaluation, made of the same files: choose what follows among four, finish a line (lm-evaluation-harness).
A size is of the graph and its weights.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from export import OnnxOptions, export_onnx
from export.verification.eager_scorer import EagerScorer
from runtime import load
from runtime.evaluation.perplexity import PerplexityOptions, perplexity
from runtime.evaluation.tasks import EvaluateOptions, evaluate
from wm_models.training.data import Corpus, read_documents, standard_library
from wm_models.training.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_evaluation.tasks import write_tasks

KINDS = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4, blocks of 128": {"quantize": "int4", "block_size": 128},
}
COLUMNS = ("bytes", "bits/byte", "mean KL", "99 % KL", "same argmax", "choices", "whole lines")


def measure(source: str, kind: str, texts: list[Path], tasks: Path, names: list[str], eager: EagerScorer) -> list[str]:
    """The cells of a row of the table."""
    artifact = tasks / kind
    export_onnx(source, artifact, OnnxOptions(logits="all", **KINDS[kind]))
    engine = load(artifact)
    figures = perplexity(engine, PerplexityOptions(text=texts), eager).figures
    scores = evaluate(engine, EvaluateOptions(tasks=names, include=tasks))
    choice, completion = (scores[name] for name in names)
    size = sum(file.stat().st_size for file in artifact.glob("model.onnx*"))
    compared = figures["against"]
    return [
        kind,
        f"{size / 1e6:.2f} MB",
        f"{figures['bits_per_byte']:.4f}",
        f"{compared['mean_kl']:.1e}",
        f"{compared['kl_99th_percentile']:.1e}",
        f"{compared['argmax_agreement']:.2%}",
        f"{choice['acc,none']:.1%}",
        f"{completion['exact_match,none']:.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="doge-3m")
    parser.add_argument("--documents", type=int, default=200, help="of each task")
    options = parser.parse_args()
    recipe = Recipe.load("doge-3m", {})
    corpus = Corpus(lambda: read_documents((), recipe.exclude, skip_bad=True), recipe.held_out)
    documents = list(corpus.held_out_documents())
    table = Table("", *COLUMNS, title=options.source, title_justify="left")
    with TemporaryDirectory() as made:
        folder = Path(made)
        sources = [document.text for document in documents if len(document.text) > 5000]
        choice, _, completion = write_tasks(folder, sources, options.documents)
        texts = [standard_library() / document.name for document in documents]
        eager = EagerScorer(options.source)
        for kind in KINDS:
            table.add_row(*measure(options.source, kind, texts, folder, [choice, completion], eager))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
