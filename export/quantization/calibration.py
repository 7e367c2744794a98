"""What activations look like: text that the model writes itself, and the activations and their second moments on it.

B batch (rows of text), S tokens, K input features, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from export.progress import SILENT, Progress
from export.quantization.workers import one_thread_each
from runtime import Engine
from runtime.artifact.manifest import INPUTS, Artifact
from runtime.backends.ort_cpu import Bound, OnnxSession
from runtime.text.sampling import Sampler, Sampling

Feed: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]  # the inputs of a graph for rows of text (B, S)
ROWS, LENGTH = 64, 128  # of the calibration text: many rows, since the first tokens of a row lose most
AT_ONCE = 4  # rows of it that are observed in one run: products over more tokens are faster, and take more memory
PARTS = 4  # blocks a side in which second moments are summed: those below the diagonal mirror those above


def written_text(
    engine: Engine,
    length: int = 256,
    seed: int = 0,
    progress: Progress = SILENT,
    after_step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Ids (B, S), int64, that the model itself writes at temperature 1, each row after a first id drawn at random.

    A classifier writes nothing: all of its ids are drawn. `after_step` is called after each step of the engine.
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
        after_step()
    return np.stack(text, axis=1)


class WatchedSession(OnnxSession):
    """The session of a graph that has further outputs (B, S, K), float32: `found` has the latest step's, by name."""

    def __init__(self, artifact: Artifact, names: Sequence[str]):
        super().__init__(artifact)
        self.found: dict[str, np.ndarray] = {}
        self._widths = {out.name: out.shape[-1] for out in self.session.get_outputs() if out.name in names}

    def _bind_shape(self, bound: Bound, batch: int, length: int, rows: int) -> None:
        super()._bind_shape(bound, batch, length, rows)
        self.found = {name: np.zeros((batch, length, k), np.float32) for name, k in self._widths.items()}
        for name, buffer in self.found.items():
            bound.binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)


def written_moments(
    artifact: Artifact, names: Sequence[str], progress: Progress = SILENT
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Text (B, S) of `LENGTH` tokens that a float artifact writes, and the second moments of values as it does so.

    The values and what is returned of them: see `second_moments`. A classifier, which writes nothing, reads its text.
    """
    graph, path = ir.load(artifact.path / artifact.graph.file), artifact.path / "moments.onnx"
    _save_with_outputs(graph, path, names)
    watched = replace(artifact, graph=replace(artifact.graph, cpu_file=path.name))
    sums: dict[str, torch.Tensor] = {}
    session = WatchedSession(watched, names)
    with Engine(watched, session) as engine, one_thread_each() as workers:

        def add() -> None:
            _add_products(workers, sums, session.found)

        text = written_text(engine, LENGTH, progress=progress, after_step=add)
    if not sums and names:
        return text, second_moments(graph, path, text, names, progress=progress)
    return text, _mirrored(sums)


def second_moments(
    graph: ir.Model,
    path: Path,
    text: np.ndarray,
    names: Sequence[str],
    feed: Feed | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """Σ xᵀx, (K, K) float32, over the tokens of `text` (rows, S), of each of the graph's values `names` (B, S, K).

    The other arguments are those of `observe`.
    """
    sums: dict[str, torch.Tensor] = {}
    with one_thread_each() as workers:
        for found in observe(graph, path, text, names, feed, progress):
            _add_products(workers, sums, found)
    return _mirrored(sums)


def _bounds(size: int) -> Iterator[tuple[int, int]]:
    edges = [size * part // PARTS for part in range(PARTS + 1)]
    return pairwise(edges)


def _add_products(workers: Executor, sums: dict[str, torch.Tensor], found: Mapping[str, np.ndarray]) -> None:
    """Add to each sum (K, K) the xᵀx of what was found, (B, S, K), in its blocks on and above the diagonal."""

    def add(name: str) -> None:
        x = torch.from_numpy(found[name]).flatten(0, -2)
        total = sums[name]
        for start, end in _bounds(len(total)):
            total[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    for name in found.keys() - sums.keys():
        sums[name] = torch.zeros(found[name].shape[-1], found[name].shape[-1])
    list(workers.map(add, found))  # which raises what a worker raised


def _mirrored(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of `_add_products`, with the blocks below the diagonal filled in."""
    for total in sums.values():
        for start, end in _bounds(len(total)):
            total[end:, start:end] = total[start:end, end:].T
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
    order = sorted(set(names))
    _save_with_outputs(graph, path, order)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = feed or _step_feed(graph, text.shape[1])
    progress.stage("observing activations", len(text))
    for start in range(0, len(text), AT_ONCE):
        rows = text[start : start + AT_ONCE]
        yield dict(zip(order, session.run(order, feed(rows)), strict=True))
        progress.advance(len(rows))


def _save_with_outputs(graph: ir.Model, path: Path, names: Sequence[str]) -> None:
    """Write the graph to `path`, beside its weights, with the values `names` as further outputs."""
    values = {out.name: out for node in graph.graph for out in node.outputs}
    before = len(graph.graph.outputs)
    graph.graph.outputs.extend(values[name] for name in sorted(set(names)))
    ir.save(graph, path)
    del graph.graph.outputs[before:]


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
