"""Is the exported graph the eager model? Teacher-forced passes through both, compared number by number.

B batch, S new tokens, V vocabulary.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from export.errors import ExportError
from export.package.directory import VERIFICATION, replacing, write_json, write_manifest
from export.quantization.graph import written_text
from export.source import load_model
from export.verification.bias_probe import Values, drawn_biases, with_biases
from export.verification.ranges import BiasRange, watched_biases
from runtime import ArtifactError, Engine, load
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, Window
from runtime.artifact.signature import SIGNATURE
from runtime.backends.ort_cpu import OnnxSession
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead

STEPS = 64
LOGIT_TOLERANCE = 1e-4  # times max(1, max|logit|), float32
# nats, mean over positions, against the float32 model
KL_LIMITS = {"float16": 1e-3, "bfloat16": 1e-3, "int8": 2e-3, "int4": 3e-2}
REPEATED = 4096  # tokens of a case at most that is repeated


@dataclass(frozen=True)
class Case:
    """One run of the engine: a prompt of `prompts[b]` tokens for slot b, then decode steps.

    A slot whose `idle` divides the step's number (from 1) sits that step out; 0 never does.
    """

    name: str
    prompts: tuple[int, ...]
    steps: int
    idle: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """The verdict on one case. Differences are of logits; KL in nats, of the eager distribution from the graph's."""

    case: str
    positions: int
    max_difference: float
    difference_limit: float | None
    mean_kl: float
    kl_limit: float | None
    argmax_agreement: float
    argmax_flips: int
    passed: bool


def plan(max_length: int, max_batch: int, rows: int) -> list[Case]:
    """Prefill and decode at several lengths, a ragged batch with idle slots, and beyond `rows`, where keys begin to be
    left out: the keep window, or the rows of the caches."""
    steps = min(STEPS, max(1, max_length // 2))
    longest = max_length - steps
    lengths = sorted({min(length, longest) for length in (1, 17, 128)})
    if rows < longest:
        lengths.append(min(rows + 32, longest))
    cases = [Case(f"prompt {length}, {steps} steps", (length,), steps, (0,)) for length in lengths]
    if max_length > 320:  # across a capacity bucket
        cases.append(Case("prompt 240, 32 steps over a bucket's end", (240,), 32, (0,)))
    if max_batch > 1:
        ragged = tuple(max(1, min(length, longest)) for length in (5, 33, 20, 1))[: min(max_batch, 4)]
        cases.append(Case(f"ragged batch {ragged}", ragged, steps, (0,) * len(ragged)))
        cases.append(Case(f"idle slots, batch {ragged}", ragged, steps, (0, 2, 3, 5)[: len(ragged)]))
    return cases


def probe_plan(max_length: int, max_batch: int, rows: int) -> list[Case]:
    """With the bias in sight: a ragged batch, and a pass beyond `rows`."""
    steps = min(16, max(1, max_length // 2))
    longest = max_length - steps
    ragged = tuple(max(1, min(length, longest)) for length in (33, 5)[:max_batch])
    cases = [Case(f"A drawn at random, prompts {ragged}", ragged, steps, (0,) * len(ragged))]
    if rows < longest:
        length = min(rows + 32, longest)
        cases.append(Case(f"A drawn at random, prompt {length}", (length,), steps, (0,)))
    return cases


def repeated(case: Case, max_batch: int) -> Case:
    """The same over more pieces of text, in as many slots as there are and `REPEATED` tokens allow.

    What quantisation costs is a mean over text, and one token may cost twenty times as much: few positions tell little.
    """
    slots, tokens = len(case.prompts), sum(case.prompts) + len(case.prompts) * case.steps
    times = max(1, min(max_batch // slots, REPEATED // tokens))
    name = f"{case.name}, {times} times" if times > 1 else case.name
    return replace(case, name=name, prompts=case.prompts * times, idle=case.idle * times)


def eager_logits(model: DecoderWithHead, ids: torch.Tensor, first: int) -> np.ndarray:
    """Logits (S - first, V), float32, of one sequence (S,) from position `first` on, by one uncached pass.

    Where RoPE's frequencies depend on the length, a key keeps those of the pass that wrote it, and where a share of all
    keys is dropped, their number counts: then the reference writes its keys as the engine does, `first` and all before
    it at once, the others one by one.
    """
    with torch.inference_mode():
        if model.config.rope["rope_type"] in ("dynamic", "longrope") or model.config.dynamic_mask_ratio:
            cache, rows = DynamicCache(config=model.config), []
            for start, end in [(0, first + 1), *((at, at + 1) for at in range(first + 1, ids.shape[0]))]:
                rows.append(_logits_at(model, ids[start:end], torch.tensor([end - start - 1]), cache))
            return np.concatenate(rows)
        return _logits_at(model, ids, torch.arange(first, ids.shape[0]), None)


def _logits_at(
    model: DecoderWithHead, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache | None
) -> np.ndarray:
    """Logits (positions, V), float32, of one sequence (S,) by the model's own pass.

    A classifier's pass answers for the last token alone, so its head is applied to the hidden states of the others too.
    """
    options = {"cache": cache, "use_cache": cache is not None}
    if isinstance(model, DecoderForCausalLM):
        logits = model(ids[None], logits_to_keep=positions, **options).logits
    else:
        logits = model.head(model.model(ids[None], **options).last_hidden_state[:, positions])
    return logits[0].float().numpy()


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


def compare(case: Case, expected: list[np.ndarray], found: list[np.ndarray], kl_limit: float | None) -> Comparison:
    """Hold the graph's logits, (positions, V) a slot, against the eager model's: one by one, or by `kl_limit`."""
    eager = np.concatenate([e[: len(f)] for e, f in zip(expected, found, strict=True)]).astype(np.float64)
    graph = np.concatenate(found).astype(np.float64)
    difference = np.abs(eager - graph).max(-1)
    if eager.shape[1] == 1:  # the one label of a classifier stands against zero, as a sigmoid reads it
        eager, graph = (np.pad(x, ((0, 0), (0, 1))) for x in (eager, graph))
    limit = LOGIT_TOLERANCE * max(1.0, float(np.abs(eager).max()))
    with np.errstate(invalid="ignore"):  # what is not finite does not pass
        log_eager, log_graph = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (eager, graph))
        mean_kl = float((np.exp(log_eager) * (log_eager - log_graph)).sum(-1).mean())
    two = np.partition(eager, -2, axis=-1)[:, -2:]
    agree = eager.argmax(-1) == graph.argmax(-1)
    flips = int((~agree & (two[:, 1] - two[:, 0] > limit)).sum())  # where the eager margin exceeds the limit
    exact = kl_limit is None
    finite = bool(np.isfinite(graph).all())
    passed = finite and (float(difference.max()) <= limit and flips == 0 if exact else mean_kl <= kl_limit)
    return Comparison(
        case.name, len(eager), float(difference.max()), limit if exact else None,
        mean_kl, kl_limit, float(agree.mean()), flips, passed,
    )  # fmt: skip


def judge(
    engine: Engine, case: Case, sequences: Sequence[np.ndarray], expected: list[np.ndarray], kl_limit: float | None
) -> Comparison:
    """Run a case and compare. What does not run agrees with nothing."""
    try:
        found = run_case(engine, case, sequences)
    except ArtifactError:
        found = [np.full_like(rows, np.nan) for rows in expected]
    return compare(case, expected, found, kl_limit)


def _draw_tokens(draw: np.random.Generator, vocabulary: int, length: int) -> np.ndarray:
    """Random tokens (length,), no two equal where the vocabulary has as many.

    Equal tokens have equal biases in the first layer. Which of them a selection keeps would turn on the last bit, and
    that is not the same in products of one row and of many.
    """
    if length <= vocabulary:
        return draw.permutation(vocabulary)[:length]
    return draw.integers(0, vocabulary, length)


def _draw_sequences(
    case: Case, draw: np.random.Generator, vocabulary: int, text: np.ndarray | None
) -> list[np.ndarray]:
    """What each slot of a case reads: random ids, or pieces of `text` (rows, S)."""
    lengths = [length + case.steps for length in case.prompts]
    if text is None:
        return [_draw_tokens(draw, vocabulary, length) for length in lengths]
    return [np.resize(np.roll(text, -draw.integers(text.size)), length) for length in lengths]


class Reference:
    """The eager model's answers to a plan, taken before the model is lowered and used up.

    `drawn` are the values of A that it had then, where they are not its own. It reads random ids or, where `text`
    (rows, S) is given, pieces of that: what quantisation costs shows on text.
    """

    def __init__(
        self,
        model: DecoderWithHead,
        cases: list[Case],
        drawn: Values | None = None,
        text: np.ndarray | None = None,
    ):
        draw = np.random.default_rng(0)
        self.cases, self.drawn = cases, drawn or {}
        self.sequences: list[list[np.ndarray]] = []
        self.logits: list[list[np.ndarray]] = []
        for case in cases:
            rows = _draw_sequences(case, draw, model.config.vocab_size, text)
            self.sequences.append(rows)
            self.logits.append(
                [eager_logits(model, torch.from_numpy(row), at - 1) for row, at in zip(rows, case.prompts, strict=True)]
            )
            if not all(np.isfinite(logits).all() for logits in self.logits[-1]):
                raise ExportError(
                    f"the eager model's own logits are not finite ({case.name}); there is nothing to export"
                )

    def check(self, engine: Engine, report: Callable[[Comparison], None]) -> list[Comparison]:
        """Run every case, handing each verdict to `report` as it comes."""
        graph, verdicts = engine.graph, []
        limit = KL_LIMITS.get(graph.dtype if graph.quantization == "none" else graph.quantization)
        for case, sequences, expected in zip(self.cases, self.sequences, self.logits, strict=True):
            verdict = judge(engine, case, sequences, expected, limit)
            report(verdict)
            verdicts.append(verdict)
        return verdicts


def references(
    model: DecoderWithHead,
    max_length: int,
    max_batch: int,
    window: Window | None,
    text: np.ndarray | None = None,
    in_sight: bool = True,
) -> tuple[list[Reference], dict[str, BiasRange]]:
    """The answers of the model as it is and, unless told not to, with its bias `in_sight`; and the range of its biases
    on the way. `text` as in `Reference`.

    Raises `ExportError` where the model's own logits are not finite.
    """
    limits = max_length, max_batch, window.rows if window else model.config.keep_window_size
    cases = plan(*limits) if text is None else [repeated(case, max_batch) for case in plan(*limits)]
    with watched_biases(model) as biases:
        answers = [Reference(model, cases, text=text)]
    if in_sight:
        with drawn_biases(model, max((found.softplus for found in biases.values()), default=0.0)) as drawn:
            if drawn:
                answers.append(Reference(model, probe_plan(*limits), drawn, text))
    return answers, biases


def check(directory: Path, answers: list[Reference], report: Callable[[Comparison], None]) -> list[Comparison]:
    """Hold the artifact in `directory` against the eager model's answers; writes a graph there for a while."""
    artifact, verdicts = read_artifact(directory, allow_unverified=True), []
    for reference in answers:
        with with_biases(artifact, reference.drawn) if reference.drawn else nullcontext(artifact) as tried:
            verdicts += reference.check(Engine(tried, OnnxSession(tried)), report)
    return verdicts


def check_exact(
    directory: Path,
    answers: list[Reference],
    reload: Callable[[], DecoderWithHead],
    report: Callable[[Comparison], None],
) -> list[Comparison]:
    """`check`, and where float32 logits do not pass, all of it once more with the eager model in float64 as the judge.

    At an ill-conditioned token the eager model in float32 may be further from the truth than the graph is.
    """
    verdicts = check(directory, answers, report)
    if all(verdict.passed or verdict.kl_limit is not None for verdict in verdicts):
        return verdicts
    graph = read_artifact(directory, allow_unverified=True).graph
    exact, _ = references(reload().double(), graph.max_length, graph.max_batch, graph.window)
    for reference in exact:
        reference.cases = [replace(case, name=f"{case.name}, against float64") for case in reference.cases]
    return check(directory, exact, report)


def check_quantized(directory: Path, model: DecoderWithHead, report: Callable[[Comparison], None]) -> list[Comparison]:
    """Check a quantised artifact on text that it wrote itself, and its portable graph, which a CPU runs slowly, against
    the other one: they read the same codes, and only the other rounds what it multiplies with them, to eight bits.

    A classifier writes none, and reads other random ids than it was calibrated on.
    """
    engine = load(directory, "cpu", allow_unverified=True)
    graph, text = engine.graph, None if engine.labels else written_text(engine)
    # four bits are calibrated with the model's own A, and lose more with another
    in_sight = graph.quantization == "int8"
    answers, _ = references(model, graph.max_length, graph.max_batch, graph.window, text, in_sight)
    verdicts = check(directory, answers, report)
    portable = replace(engine.artifact, graph=replace(graph, cpu_file=graph.file))
    steps = min(4, max(1, graph.max_length // 2))
    length = max(1, min(17, graph.max_length - steps))
    case = repeated(Case(f"{graph.file}, prompt {length}, {steps} steps", (length,), steps, (0,)), graph.max_batch)
    pieces = _draw_sequences(case, np.random.default_rng(0), graph.vocabulary, text)
    answer = run_case(engine, case, pieces)
    verdict = judge(Engine(portable, OnnxSession(portable)), case, pieces, answer, KL_LIMITS["int8"])
    report(verdict)
    return [*verdicts, verdict]


def record_verdicts(
    directory: Path, manifest: dict[str, Any], origin: dict[str, Any], verdicts: list[Comparison]
) -> None:
    """Write verification.json, and the manifest with its verdict."""
    passed = all(verdict.passed for verdict in verdicts)
    record = {"source": origin, "passed": passed, "comparisons": [asdict(verdict) for verdict in verdicts]}
    write_json(directory / VERIFICATION, record)
    write_manifest(directory, manifest, verified=passed)


def worst(verdicts: list[Comparison]) -> str:
    """One line on the case that failed by most."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    verdict = max(failed, key=lambda v: (v.mean_kl if v.kl_limit else v.max_difference, v.argmax_flips))
    if verdict.kl_limit is not None:
        measure = f"mean KL {verdict.mean_kl:.2e}, limit {verdict.kl_limit:.0e}"
    else:
        measure = f"max |Δlogit| {verdict.max_difference:.2e}, limit {verdict.difference_limit:.2e}"
    return f"{len(failed)} of {len(verdicts)} checks failed; worst: {verdict.case}: {measure}"


def verify(
    directory: str | Path, source: str | None = None, report: Callable[[Comparison], None] = lambda verdict: None
) -> list[Comparison]:
    """Repeat the comparison of an artifact with its eager model, and renew its verdict.

    `source`: the checkpoint directory or preset, where it is no longer what verification.json names. A signed artifact
    that passes again stays as it is; where the verdict changes, the signature goes.
    Raises `runtime.ArtifactError` for a damaged artifact, `ExportError` where there is no source to compare with.
    """
    directory = Path(directory)
    artifact = read_artifact(directory, allow_unverified=True)
    origin = {"source": source, "seed": 0}
    if source is None:
        origin = artifact.read_json(VERIFICATION).get("source")
        if not (isinstance(origin, dict) and isinstance(origin.get("source"), str)):
            raise ExportError(
                f"{directory / VERIFICATION}: names no source to compare with; name the checkpoint with --source"
            )
    reload = partial(load_model, origin["source"], origin.get("seed", 0))
    model = reload()
    graph, quantised = artifact.graph, artifact.graph.quantization != "none"
    answers = [] if quantised else references(model, graph.max_length, graph.max_batch, graph.window)[0]
    with replacing(directory, force=True) as new:
        shutil.copytree(directory, new, copy_function=os.link, dirs_exist_ok=True)
        verdicts = check_quantized(new, model, report) if quantised else check_exact(new, answers, reload, report)
        stands = artifact.verified and all(verdict.passed for verdict in verdicts)
        if not (stands and (new / SIGNATURE).exists()):
            (new / SIGNATURE).unlink(missing_ok=True)
            kept = {
                key: value for key, value in json.loads(artifact.manifest).items() if key not in ("files", "verified")
            }
            record_verdicts(new, kept, origin, verdicts)
        if (directory / MANIFEST).read_bytes() != artifact.manifest:
            raise ExportError(f"{directory}: another export replaced it meanwhile; verify it again")
    return verdicts
