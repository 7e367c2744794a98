"""The eager model's answers, by uncached passes in the dtype of its weights.

B batch, S tokens of a sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache

from export.errors import ExportError
from export.progress import SILENT, Progress
from export.verification.bias_probe import Values, drawn_biases
from export.verification.cases import Case, draw_sequences, plan, probe_plan, repeated
from export.verification.ranges import BiasRange, watched_biases
from runtime.artifact.manifest import Window
from wm_models.decoder import DecoderForCausalLM, DecoderWithHead


def eager_logits(model: DecoderWithHead, ids: torch.Tensor, positions: np.ndarray) -> np.ndarray:
    """Logits (B, P, V), float32, of sequences (B, S) after the ascending `positions` (P), by one uncached pass.

    Where the prompt's length counts, the reference writes its keys as the engine does, the first position and all
    before it at once, the others one by one; then the positions are those from the first to the last token.
    """
    with torch.inference_mode():
        if _depends_on_prompt(model):
            cache, rows, first = DynamicCache(config=model.config), [], int(positions[0])
            for start, end in [(0, first + 1), *((at, at + 1) for at in range(first + 1, ids.shape[1]))]:
                rows.append(_logits_at(model, ids[:, start:end], torch.tensor([end - start - 1]), cache))
            return np.concatenate(rows, axis=1)
        return _logits_at(model, ids, torch.from_numpy(positions), None)


def _depends_on_prompt(model: DecoderWithHead) -> bool:
    """Whether logits depend on how many tokens were read at once.

    Where RoPE's frequencies depend on the length, a key keeps those of the pass that wrote it, and where a share of all
    keys is dropped, their number counts.
    """
    return model.config.rope["rope_type"] in ("dynamic", "longrope") or model.config.dynamic_mask_ratio > 0


def _logits_at(
    model: DecoderWithHead, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache | None
) -> np.ndarray:
    """Logits (B, positions, V), float32, of sequences (B, S) by the model's own pass.

    A classifier's pass answers for the last token alone, so its head is applied to the hidden states of the others too.
    """
    options = {"cache": cache, "use_cache": cache is not None}
    if isinstance(model, DecoderForCausalLM):
        logits = model(ids, logits_to_keep=positions, **options).logits
    else:
        logits = model.head(model.model(ids, **options).last_hidden_state[:, positions])
    return logits.float().numpy()


class Bounds(Protocol):
    """The sizes of a graph that decide what it is run on."""

    @property
    def max_length(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def window(self) -> Window | None: ...


@dataclass
class Reference:
    """The eager model's answers to `cases`: what each slot of each case reads, ids (S,), and logits (1 + steps, V).

    `drawn` are the values of A that the model had for them, where they are not its own.
    """

    cases: list[Case]
    sequences: list[list[np.ndarray]]
    logits: list[list[np.ndarray]]
    drawn: Values


def _groups(model: DecoderWithHead, cases: Sequence[Case]) -> list[list[Case]]:
    """The cases whose slots read the same tokens, each as many of them as it needs, so that one pass answers all.

    Tokens that repeat are others. Where the length of the prompt counts, each case has a pass of its own.
    """
    if _depends_on_prompt(model):
        return [[case] for case in cases]
    groups = ([case for case in cases if case.repeats == repeats] for repeats in (False, True))
    return [group for group in groups if group]


def _longest(group: Sequence[Case]) -> Case:
    """A case of no steps whose slots read all that the slots of any case in the group read."""
    lengths = [0] * max(len(case.prompts) for case in group)
    for case in group:
        for slot, prompt in enumerate(case.prompts):
            lengths[slot] = max(lengths[slot], prompt + case.steps)
    return Case(group[0].name, tuple(lengths), 0, (0,) * len(lengths), group[0].repeats)


def _spans(group: Sequence[Case], slot: int) -> list[range]:
    """The positions of a slot after which the cases compare logits."""
    return [
        range(case.prompts[slot] - 1, case.prompts[slot] + case.steps) for case in group if slot < len(case.prompts)
    ]


def _answer(
    model: DecoderWithHead, cases: list[Case], text: np.ndarray | None, drawn: Values, progress: Progress
) -> Reference:
    draw, found = np.random.default_rng(0), {}
    for group in _groups(model, cases):
        longest = _longest(group)
        rows = draw_sequences(longest, draw, model.config.vocab_size, text)
        answers: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(rows)
        for length in sorted(set(longest.prompts)):  # sequences of one length are one batch
            slots = [slot for slot, other in enumerate(longest.prompts) if length == other]
            positions = np.unique([at for slot in slots for span in _spans(group, slot) for at in span])
            logits = eager_logits(model, torch.from_numpy(np.stack([rows[slot] for slot in slots])), positions)
            for slot, each in zip(slots, logits, strict=True):
                answers[slot] = positions, each
            progress.advance(length * len(slots))
        for case in group:
            slots = list(zip(rows, answers, case.prompts, strict=False))
            read = [ids[: prompt + case.steps] for ids, _, prompt in slots]
            parts = [_part(*known, prompt - 1, case.steps + 1) for _, known, prompt in slots]
            if not all(np.isfinite(each).all() for each in parts):
                raise ExportError(
                    f"the eager model's own logits are not finite ({case.name}); there is nothing to export"
                )
            found[case] = read, parts
    return Reference(cases, [found[case][0] for case in cases], [found[case][1] for case in cases], drawn)


def _part(positions: np.ndarray, logits: np.ndarray, first: int, count: int) -> np.ndarray:
    """Of logits (P, V) after `positions` (P), ascending, those after `count` positions from `first` on: a view."""
    start = int(np.searchsorted(positions, first))
    return logits[start : start + count]


def references(
    model: DecoderWithHead,
    bounds: Bounds,
    text: np.ndarray | None = None,
    probe_bias: bool = True,
    progress: Progress = SILENT,
) -> tuple[list[Reference], dict[str, BiasRange]]:
    """The answers of the model as it is and, with `probe_bias`, with A drawn at random; and the range of its biases.

    The model reads random ids or, where `text` (rows, S) is given, pieces of that: what quantisation costs shows on
    text. Raises `ExportError` where the model's own logits are not finite.
    """
    window, most = bounds.window, bounds.max_batch
    limits = bounds.max_length, most, window.rows if window else model.config.keep_window_size
    cases = plan(*limits) if text is None else [repeated(case, most) for case in plan(*limits)]
    probes = probe_plan(*limits) if probe_bias else []
    groups = [*_groups(model, cases), *_groups(model, probes)]
    total = sum(length for group in groups for length in _longest(group).prompts)
    progress.stage("computing the eager model's answers", total)
    with watched_biases(model) as biases:
        answers = [_answer(model, cases, text, {}, progress)]
    if probes:
        with drawn_biases(model, max((found.softplus for found in biases.values()), default=0.0)) as drawn:
            if drawn:
                answers.append(_answer(model, probes, text, drawn, progress))
    return answers, biases
