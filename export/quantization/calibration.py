"""What activations look like: text that the model writes itself, and the activations and their second moments on it.

B batch (rows of text), S tokens, K input features, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from export.progress import SILENT, Progress
from runtime import Engine
from runtime.artifact.manifest import INPUTS
from runtime.text.sampling import Sampler, Sampling

Feed: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]  # the inputs of a graph for rows of text (B, S)
ROWS, LENGTH = 64, 128  # of the calibration text: many rows, since the first tokens of a row lose most
AT_ONCE = 4  # rows of it that are observed in one run: products over more tokens are faster, and take more memory


def written_text(engine: Engine, length: int = 256, seed: int = 0, progress: Progress = SILENT) -> np.ndarray:
    """Ids (B, S), int64, that the model itself writes at temperature 1, each row after a first id drawn at random.

    A classifier writes nothing: all of its ids are drawn.
    """
    rows, sampler = engine.graph.max_batch, Sampler(Sampling(temperature=1.0, seed=seed))
    length, draw = min(length, engine.graph.max_length), np.random.default_rng(seed)
    if engine.labels:
        return draw.integers(0, engine.graph.vocabulary, (rows, length))
    engine.reset()
    engine.reserve(rows, length)
    text = [draw.integers(0, engine.graph.vocabulary, rows)]
    progress.stage("writing text with the model", length - 1)
    while len(text) < length:
        progress.advance()
        text.append(sampler(engine.decode(text[-1]), [[]] * rows))
    return np.stack(text, axis=1)


def second_moments(
    graph: ir.Model,
    path: Path,
    text: np.ndarray,
    names: list[str],
    feed: Feed | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Σ xᵀx, (K, K) float32, over the tokens of `text` (rows, S), of each of the graph's values `names` (B, S, K).

    The other arguments are those of `observe`.
    """
    sums: dict[str, torch.Tensor] = {}
    for found in observe(graph, path, text, names, feed, progress):
        for name, value in found.items():
            x = torch.from_numpy(value).flatten(0, -2)
            total = sums.setdefault(name, torch.zeros(x.shape[1], x.shape[1]))
            total.addmm_(x.T, x)
    return sums


def observe(
    graph: ir.Model,
    path: Path,
    text: np.ndarray,
    names: Sequence[str],
    feed: Feed | None = None,
    progress: Progress = SILENT,
) -> Iterator[dict[str, np.ndarray]]:
    """What the graph's values `names` are on `text` (rows, S), by name, `AT_ONCE` rows at a time.

    The graph is written to `path`, beside its weights, with these values as further outputs. `feed` gives the inputs
    for rows of text; by default those of a step graph.
    """
    values = {out.name: out for node in graph.graph for out in node.outputs}
    outputs, order = list(graph.graph.outputs), sorted(set(names))
    graph.graph.outputs.extend(values[name] for name in order)
    ir.save(graph, path)
    del graph.graph.outputs[len(outputs) :]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = feed or _step_feed(graph, text.shape[1])
    progress.stage("observing activations", len(text))
    for start in range(0, len(text), AT_ONCE):
        rows = text[start : start + AT_ONCE]
        yield dict(zip(order, session.run(order, feed(rows)), strict=True))
        progress.advance(len(rows))


def _step_feed(graph: ir.Model, length: int) -> Feed:
    """The inputs of a step graph that reads rows of `length` ids into empty caches."""
    others = [value for value in graph.graph.inputs if value.name not in INPUTS]

    def feed(rows: np.ndarray) -> dict[str, np.ndarray]:
        sizes = {"batch": len(rows), "capacity": length, "rows": 1}
        states = {
            value.name or "": np.zeros(
                [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()],
                (value.dtype or ir.DataType.FLOAT).numpy(),
            )
            for value in others
        }
        steps = (rows, np.zeros(len(rows), np.int64), np.full(len(rows), length))
        return {**states, **dict(zip(INPUTS, steps, strict=True))}

    return feed
