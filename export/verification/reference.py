"""The eager model's answers, by uncached passes in the dtype of its weights.

B batch, S tokens of a sequence, V vocabulary.
"""

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


def eager_logits(model: DecoderWithHead, ids: torch.Tensor, first: int) -> np.ndarray:
    """Logits (B, S - first, V), float32, of sequences (B, S) from position `first` on, by one uncached pass.

    Where RoPE's frequencies depend on the length, a key keeps those of the pass that wrote it, and where a share of all
    keys is dropped, their number counts: then the reference writes its keys as the engine does, `first` and all before
    it at once, the others one by one.
    """
    with torch.inference_mode():
        if model.config.rope["rope_type"] in ("dynamic", "longrope") or model.config.dynamic_mask_ratio:
            cache, rows = DynamicCache(config=model.config), []
            for start, end in [(0, first + 1), *((at, at + 1) for at in range(first + 1, ids.shape[1]))]:
                rows.append(_logits_at(model, ids[:, start:end], torch.tensor([end - start - 1]), cache))
            return np.concatenate(rows, axis=1)
        return _logits_at(model, ids, torch.arange(first, ids.shape[1]), None)


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


def _answer(
    model: DecoderWithHead, cases: list[Case], text: np.ndarray | None, drawn: Values, progress: Progress
) -> Reference:
    draw = np.random.default_rng(0)
    reference = Reference(cases, [], [], drawn)
    for case in cases:
        rows = draw_sequences(case, draw, model.config.vocab_size, text)
        logits: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for at in sorted(set(case.prompts)):  # sequences of one length are one batch
            slots = [slot for slot, length in enumerate(case.prompts) if length == at]
            ids = torch.from_numpy(np.stack([rows[slot] for slot in slots]))
            for slot, found in zip(slots, eager_logits(model, ids, at - 1), strict=True):
                logits[slot] = found
            progress.advance(ids.numel())
        if not all(np.isfinite(each).all() for each in logits):
            raise ExportError(f"the eager model's own logits are not finite ({case.name}); there is nothing to export")
        reference.sequences.append(rows)
        reference.logits.append(logits)
    return reference


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
    total = sum(length + case.steps for case in (*cases, *probes) for length in case.prompts)
    progress.stage("computing the eager model's answers", total)
    with watched_biases(model) as biases:
        answers = [_answer(model, cases, text, {}, progress)]
    if probes:
        with drawn_biases(model, max((found.softplus for found in biases.values()), default=0.0)) as drawn:
            if drawn:
                answers.append(_answer(model, probes, text, drawn, progress))
    return answers, biases
