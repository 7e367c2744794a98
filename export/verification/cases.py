"""What the engine is run on: prompts of several lengths, ragged batches with idle slots, caches past their window.

B batch (slots), S tokens, V vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np

STEPS = 64
REPEATED = 4096  # tokens of a case at most that is repeated


@dataclass(frozen=True)
class Case:
    """One run of the engine: a prompt of `prompts[b]` tokens for slot b, then decode steps.

    A slot whose `idle` divides the step's number (from 1) sits that step out; 0 never does. With `repeats` tokens come
    again and again, as in text: which of the keys with equal biases are kept then shows in the logits.
    """

    name: str
    prompts: tuple[int, ...]
    steps: int
    idle: tuple[int, ...]
    repeats: bool = False


def plan(max_length: int, max_batch: int, rows: int) -> list[Case]:
    """Prefill and decode at several lengths, a ragged batch with idle slots, and beyond `rows`, where keys begin to be
    left out: the keep window, or the rows of the caches."""
    steps = min(STEPS, max(1, max_length // 2))
    longest = max_length - steps
    lengths = sorted({min(length, longest) for length in (1, 17, 128)})
    if rows < longest:
        lengths.append(min(rows + 32, longest))
    cases = [Case(f"prompt {length}, {steps} steps", (length,), steps, (0,)) for length in lengths]
    if rows < longest:
        length = lengths[-1]
        cases.append(Case(f"repeated tokens, prompt {length}, {steps} steps", (length,), steps, (0,), repeats=True))
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


def _draw_tokens(draw: np.random.Generator, vocabulary: int, length: int, repeats: bool) -> np.ndarray:
    """Random tokens (length,): by Zipf's law where they are to repeat, the n-th of them n times as rare as the first.

    Else no two are equal where the vocabulary has as many.
    """
    if repeats:
        shares = 1 / np.arange(1, vocabulary + 1)
        return draw.permutation(vocabulary)[draw.choice(vocabulary, length, p=shares / shares.sum())]
    if length <= vocabulary:
        return draw.permutation(vocabulary)[:length]
    return draw.integers(0, vocabulary, length)


def draw_sequences(case: Case, draw: np.random.Generator, vocabulary: int, text: np.ndarray | None) -> list[np.ndarray]:
    """What each slot of a case reads: random ids, or pieces of `text` (rows, S)."""
    lengths = [length + case.steps for length in case.prompts]
    if text is None:
        return [_draw_tokens(draw, vocabulary, length, case.repeats) for length in lengths]
    return [np.resize(np.roll(text, -draw.integers(text.size)), length) for length in lengths]
