"""Continuous batching: many prompts through a fixed number of slots, and a file of them in and out; a file of texts to
classify, likewise.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.scheduler import Request, Scheduler
from runtime.text.labels import label_scores
from runtime.text.sampling import GREEDY, Sampling
from runtime.text.tokenizer import decode, encode

ANSWERS = {"prompt": ("line", "new_ids", "text"), "text": ("line", "prediction")}  # names that are added, by the key


@dataclass
class Prompt:
    """One line of a prompt file: its number from 0, what it said, and the ids to continue."""

    line: int
    given: dict[str, Any]
    ids: list[int]


def generate_many(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, slots: int, sampling: Sampling = GREEDY
) -> Iterator[tuple[Prompt, list[int]]]:
    """Each prompt with the ids that follow it, in the order they are finished.

    Up to `slots` prompts are under way at once; a slot that is done takes the next prompt between two steps. What a
    prompt gets depends on itself and on `slots`, not on its company (see `runtime.scheduler`). With a seed, a prompt's
    draws are those of the seed plus its line. Raises `RequestError` for a prompt that does not fit, before anything
    runs.
    """
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    scheduler = Scheduler(engine, slots, engine.session.chunk, prefix_memory=0)
    begun: dict[int, tuple[Prompt, list[int]]] = {}
    for prompt in prompts:
        seed = None if sampling.seed is None else sampling.seed + prompt.line
        request = Request(prompt.ids, max_new_tokens, replace(sampling, seed=seed), text=False)
        begun[scheduler.begin(request)] = prompt, []
    for event in scheduler.run():
        prompt, new = begun[event.sequence]
        if event.error is not None:
            raise RequestError(f"line {prompt.line + 1}: {event.error}")
        if event.token is not None:
            new.append(event.token)
        if event.finish_reason is not None:
            yield begun.pop(event.sequence)


def read_prompts(engine: Engine, path: Path, key: str = "prompt") -> list[Prompt]:
    """The prompts of a JSONL file, each line an object with a text, under `key`, or `ids`, and whatever else it likes
    but the names of its answer's own. Raises `RequestError`.
    """
    prompts = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        where = f"{path}: line {number + 1}"
        try:
            given = json.loads(text)
        except ValueError as error:
            raise RequestError(f"{where} is no JSON: {error}") from error
        if not isinstance(given, dict) or (key in given) == ("ids" in given):
            raise RequestError(f"{where}: expected an object with either a {key} or ids")
        taken = [name for name in ANSWERS[key] if name in given]
        if taken:
            raise RequestError(f"{where}: has {taken[0]}, which is what its answer adds; give it another name")
        if "ids" in given:
            ids = given["ids"]
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise RequestError(f"{where}: ids are {str(ids)[:60]}; expected a list of integers")
        elif not isinstance(given[key], str):
            raise RequestError(f"{where}: {key} is {type(given[key]).__name__}; expected a text")
        else:
            ids = encode(engine.tokenizer, given[key], engine.artifact)
        try:
            engine.check_prompt(ids)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
        prompts.append(Prompt(number, given, ids))
    if not prompts:
        raise RequestError(f"{path}: is empty; expected a {key} on each line")
    return prompts


def finished_lines(path: Path, prompts: Sequence[Prompt]) -> set[int]:
    """The lines of `prompts` that the output file has already; a last line that was cut short is taken off it.

    Raises `RequestError` where the file answers other prompts.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    for number, text in enumerate(whole.splitlines()):
        try:
            answer = json.loads(text)
            line = answer["line"]
            same = all(answer[key] == value for key, value in prompts[line].given.items())
        except (ValueError, LookupError, TypeError):
            line, same = -1, False
        if not same:
            raise RequestError(f"{path}: line {number + 1} answers no line of the prompts; choose another --out")
        done.add(line)
    if len(whole) < len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    return done


def generate_file(
    engine: Engine, prompts: Sequence[Prompt], out: Path, max_new_tokens: int, slots: int, sampling: Sampling = GREEDY
) -> Iterator[int]:
    """Continue what `out` lacks of `prompts`, appending a line of JSON for each that is finished; yields its number.

    A line is the prompt's object with `line`, `new_ids` and, where there is a tokenizer, `text`.
    """

    def answers(left: list[Prompt]) -> Iterator[tuple[Prompt, dict[str, Any]]]:
        for prompt, new in generate_many(engine, left, max_new_tokens, slots, sampling):
            text = {} if engine.tokenizer is None else {"text": decode(engine.tokenizer, new)}
            yield prompt, {"new_ids": new, **text}

    engine.check_task(classifies=False)
    return _append_answers(prompts, out, answers)


def classify_file(engine: Engine, prompts: Sequence[Prompt], out: Path) -> Iterator[int]:
    """Classify what `out` lacks of `prompts`, likewise.

    A line is the prompt's object with `line` and, as its `prediction`, the most likely `label`, its `score` and all
    `logits`, in the order of `Engine.labels`.
    """

    def answers(left: list[Prompt]) -> Iterator[tuple[Prompt, dict[str, Any]]]:
        for index, logits in engine.classify_each([prompt.ids for prompt in left]):
            best = int(logits.argmax())
            score = float(label_scores(engine.artifact, logits[None])[0, best])
            found = {"label": engine.labels[best], "score": score, "logits": logits.tolist()}
            yield left[index], {"prediction": found}  # apart from the prompt's own label, which it may have

    engine.check_task(classifies=True)
    return _append_answers(prompts, out, answers)


def _append_answers(
    prompts: Sequence[Prompt], out: Path, answers: Callable[[list[Prompt]], Iterator[tuple[Prompt, dict[str, Any]]]]
) -> Iterator[int]:
    done = finished_lines(out, prompts)
    left = [prompt for prompt in prompts if prompt.line not in done]
    yield from sorted(done)
    if not left:
        return
    with out.open("a", encoding="utf-8") as stream:
        for prompt, answer in answers(left):
            stream.write(json.dumps({**prompt.given, "line": prompt.line, **answer}, ensure_ascii=False) + "\n")
            stream.flush()
            yield prompt.line
