"""Is the exported graph the eager model? Both read the same tokens, and their logits are compared.

The artifact is opened as its target says. B batch (slots), S tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from export.progress import SILENT, Progress
from export.quantization.calibration import written_text
from export.quantization.schemes import find_scheme
from export.verification.bias_probe import with_biases
from export.verification.cases import Case, draw_sequences, repeated
from export.verification.comparison import ROUNDED_PRODUCTS_KL_LIMIT, Comparison, compare, kl_limit
from export.verification.reference import Reference, references
from runtime import ArtifactError, Engine
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import Artifact
from runtime.backends.base import Session
from wm_models.decoder import DecoderWithHead

log = logging.getLogger(__name__)
Opener: TypeAlias = Callable[[Artifact], Session]


@dataclass
class Expected:
    """What an artifact is held against: the eager model, which `reload` loads, in float32.

    `answers`: those of an artifact that is not quantised, where they were computed before the model was lowered, which
    uses it up.
    """

    reload: Callable[[], DecoderWithHead]
    answers: list[Reference] | None = None


def check_artifact(
    directory: Path, expected: Expected, open_session: Opener, progress: Progress = SILENT
) -> list[Comparison]:
    """Compare the artifact in `directory`, verified or not, with the eager model. Writes a graph there for a time."""
    return compare_artifact(read_artifact(directory, allow_unverified=True), expected, open_session, progress)


def compare_artifact(
    artifact: Artifact, expected: Expected, open_session: Opener, progress: Progress = SILENT
) -> list[Comparison]:
    """As `check_artifact`, of one that is read, or described by whoever wrote it."""
    if artifact.graph.quantization == "none":
        return _check_exact(artifact, expected, open_session, progress)
    return _check_quantized(artifact, expected, open_session, progress)


def _check_exact(artifact: Artifact, expected: Expected, open_session: Opener, progress: Progress) -> list[Comparison]:
    """Where float32 logits do not pass, all is repeated with the eager model in float64 as the judge.

    At an ill-conditioned token the eager model in float32 may be further from the truth than the graph is.
    """
    answers = expected.answers
    if answers is None:
        answers, _ = references(expected.reload(), artifact.graph, progress=progress)
    comparisons = check(artifact, answers, open_session, progress)
    if kl_limit(artifact.graph) is not None or all(comparison.passed for comparison in comparisons):
        return comparisons
    answers, _ = references(expected.reload().double(), artifact.graph, progress=progress)
    for reference in answers:
        reference.cases = [replace(case, name=f"{case.name}, against float64") for case in reference.cases]
    return check(artifact, answers, open_session, progress)


def _check_quantized(
    artifact: Artifact, expected: Expected, open_session: Opener, progress: Progress
) -> list[Comparison]:
    """Check a quantised artifact on text that it wrote itself, and its portable graph against the CPU's graph.

    Both graphs read the same codes, and only the CPU's rounds activations, to eight bits. A CPU runs the portable one
    slowly, so it is run on few tokens. A classifier writes no text: it reads random ids.
    """
    engine, graph = Engine(artifact, open_session(artifact)), artifact.graph
    text = None if engine.labels else written_text(engine, progress=progress)
    # a scheme that calibrates does so with the model's own A, and loses more with another
    probe_bias = not find_scheme(graph.quantization).calibrates
    answers, _ = references(expected.reload(), graph, text, probe_bias, progress)
    comparisons = check(artifact, answers, open_session, progress, engine)
    del answers  # hundreds of megabytes, and the portable graph takes several times the weights
    portable = replace(artifact, graph=replace(graph, cpu_file=graph.file))
    steps = min(4, max(1, graph.max_length // 2))
    length = max(1, min(17, graph.max_length - steps))
    case = repeated(Case(f"{graph.file}, prompt {length}, {steps} steps", (length,), steps, (0,)), graph.max_batch)
    pieces = draw_sequences(case, np.random.default_rng(0), graph.vocabulary, text)
    answer = run_case(engine, case, pieces)
    engine.close()
    with Engine(portable, open_session(portable)) as slow:
        comparison = judge(slow, case, pieces, answer, ROUNDED_PRODUCTS_KL_LIMIT)
    progress.report(comparison)
    return [*comparisons, comparison]


def check(
    artifact: Artifact,
    answers: list[Reference],
    open_session: Opener,
    progress: Progress = SILENT,
    engine: Engine | None = None,
) -> list[Comparison]:
    """Run every case of the answers; a copy of the graph lies beside it while A is another than the model's.

    `engine`: the artifact's own, where it is open already.
    """
    progress.stage("comparing", sum(len(reference.cases) for reference in answers))
    limit, comparisons = kl_limit(artifact.graph), []
    for reference in answers:
        with ExitStack() as stack:
            tried = stack.enter_context(with_biases(artifact, reference.drawn)) if reference.drawn else artifact
            if tried is artifact and engine is not None:
                used = engine
            else:
                used = stack.enter_context(Engine(tried, open_session(tried)))
            for case, sequences, logits in zip(reference.cases, reference.sequences, reference.logits, strict=True):
                comparison = judge(used, case, sequences, logits, limit)
                progress.report(comparison)
                progress.advance()
                comparisons.append(comparison)
    return comparisons


def run_case(engine: Engine, case: Case, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The engine's logits for each slot, (1 + its steps, V): after the prompt and after each step it took."""
    engine.reset()
    width = max(case.prompts)
    ids = np.zeros((len(sequences), width), np.int64)
    for row, (sequence, length) in enumerate(zip(sequences, case.prompts, strict=True)):
        ids[row, :length] = sequence[:length]
    found = [[row] for row in engine.prefill(ids, np.array(case.prompts)).copy()]
    taken = np.array(case.prompts)
    for step in range(1, case.steps + 1):
        active = np.array([not period or step % period > 0 for period in case.idle])
        new = np.array([sequence[at] for sequence, at in zip(sequences, taken, strict=True)])
        logits = engine.decode(new) if active.all() else engine.prefill(new[:, None], active.astype(np.int64))
        for slot in np.flatnonzero(active):
            found[slot].append(logits[slot].copy())
        taken = taken + active
    return [np.stack(rows) for rows in found]


def judge(
    engine: Engine, case: Case, sequences: Sequence[np.ndarray], expected: list[np.ndarray], kl_limit: float | None
) -> Comparison:
    """Run a case and compare. What does not run agrees with nothing."""
    try:
        found = run_case(engine, case, sequences)
    except ArtifactError as error:
        log.warning("%s did not run: %s", case.name, error)
        found = [np.full_like(rows, np.nan) for rows in expected]
    comparison = compare(case, expected, found, kl_limit)
    log.log(logging.DEBUG if comparison.passed else logging.WARNING, "%s", comparison)
    return comparison
