"""Many prompts through the slots of one engine, and files of prompts or of texts to classify, in and out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.ids import as_integer
from runtime.prompts import Prompt, append_answers, finished_lines
from runtime.scheduler import Request, Scheduler
from runtime.text.labels import label_scores
from runtime.text.sampling import GREEDY, Sampling
from runtime.text.tokenizer import decode

Answers = Iterator[tuple[Prompt, dict[str, Any]]]


def generate_many(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, slots: int, sampling: Sampling = GREEDY
) -> Iterator[tuple[Prompt, list[int]]]:
    """Each prompt with the ids that follow it, in the order they are finished.

    Up to `slots` prompts are under way at once; a slot that is done takes the next prompt between two steps. What a
    prompt gets depends on itself and on `slots`, not on its company (see `runtime.scheduler`). With a seed, a prompt's
    draws are those of the seed plus its line. Raises `RequestError` for a prompt that does not fit, before anything
    runs, and for one whose logits are not finite.
    """
    for prompt, new, error in generate_each(engine, prompts, max_new_tokens, slots, sampling):
        if error is not None:
            raise RequestError(f"line {prompt.line + 1}: {error}")
        yield prompt, new


def generate_each(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, slots: int, sampling: Sampling
) -> Iterator[tuple[Prompt, list[int], str | None]]:
    """As `generate_many`, but what goes wrong with one prompt comes with it, as the third of the tuple."""
    as_integer(max_new_tokens, "max_new_tokens", 1)
    scheduler = Scheduler(engine, slots, engine.session.chunk, prefix_memory=0)
    begun: dict[int, tuple[Prompt, list[int]]] = {}
    for prompt in prompts:
        seed = None if sampling.seed is None else sampling.seed + prompt.line
        request = Request(prompt.ids, max_new_tokens, replace(sampling, seed=seed), text=False)
        begun[scheduler.begin(request)] = prompt, []
    for event in scheduler.run():
        if event.token is not None:
            begun[event.sequence][1].append(event.token)
        if event.finish_reason is not None:
            yield *begun.pop(event.sequence), event.error


def generate_file(
    engine: Engine,
    prompts: Sequence[Prompt],
    out: Path,
    max_new_tokens: int,
    slots: int,
    sampling: Sampling = GREEDY,
    *,
    strict: bool = False,
) -> Iterator[int]:
    """Continue what `out` lacks of `prompts`, appending a line of JSON for each that is finished; yields its number.

    A line is the prompt's object with `line`, `line_hash`, `new_ids` and, where there is a tokenizer, `text`; or, of a
    prompt that cannot be continued, with its `error` alone. With `strict` such a prompt raises `RequestError`.
    """

    def answers(left: list[Prompt]) -> Answers:
        for prompt, new, error in generate_each(engine, left, max_new_tokens, slots, sampling):
            text = {} if engine.tokenizer is None else {"text": decode(engine.tokenizer, new)}
            yield replace(prompt, error=error), {"new_ids": new, **text}

    engine.check_task(classifies=False)
    return _answer_rest(prompts, out, answers, strict)


def classify_file(engine: Engine, prompts: Sequence[Prompt], out: Path, *, strict: bool = False) -> Iterator[int]:
    """Classify what `out` lacks of `prompts`, likewise.

    A line is the prompt's object with `line`, `line_hash` and, as its `prediction`, the most likely `label`, its
    `score` and all `logits`, in the order of `Engine.labels`.
    """

    def answers(left: list[Prompt]) -> Answers:
        for index, logits in engine.classify_each([prompt.ids for prompt in left], strict=False):
            if not np.isfinite(logits).all():
                yield replace(left[index], error="the logits are not finite; the weights or dtype overflow"), {}
                continue
            best = int(logits.argmax())
            score = float(label_scores(engine.artifact, logits[None])[0, best])
            found = {"label": engine.labels[best], "score": score, "logits": logits.tolist()}
            yield left[index], {"prediction": found}  # apart from the prompt's own label, which it may have

    engine.check_task(classifies=True)
    return _answer_rest(prompts, out, answers, strict)


def _answer_rest(
    prompts: Sequence[Prompt], out: Path, answers: Callable[[list[Prompt]], Answers], strict: bool
) -> Iterator[int]:
    """Answer the prompts that `out` has no line of: first, with their error, those that cannot be read."""
    done = finished_lines(out, prompts)
    left = [prompt for prompt in prompts if prompt.line not in done]
    sound = [prompt for prompt in left if prompt.error is None]

    def found() -> Answers:
        yield from ((prompt, {}) for prompt in left if prompt.error is not None)
        yield from answers(sound) if sound else ()

    def checked() -> Answers:
        for prompt, answer in found():
            if strict and prompt.error is not None:
                raise RequestError(f"line {prompt.line + 1}: {prompt.error}")
            yield prompt, answer

    yield from sorted(done)
    if left:
        yield from append_answers(out, checked())
