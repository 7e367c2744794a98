"""Files of prompts in JSON lines: reading them, and appending their answers to a file that can be resumed.

A line ends at "\\n" and nowhere else. Blank lines and a byte-order mark are skipped. What is wrong with one line is
reported as that line's answer, so that the others go on.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import RequestError

# The names that an answer adds to its prompt's own, by the key of the prompt's text.
ANSWERS = {"prompt": ("line", "line_hash", "new_ids", "text"), "text": ("line", "line_hash", "prediction")}
EXPECTED = "expected an object with either a {} or ids"
MARK = b"\xef\xbb\xbf"  # a byte-order mark in UTF-8
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Prompt:
    """One line of a prompt file.

    `line`: its number from 0. `given`: its object. `ids`: the ids to continue or classify. `line_hash`: the first 16
    hexadecimal digits of the SHA-256 of its bytes. `error`: why it cannot be answered, if so.
    """

    line: int
    given: dict[str, Any]
    ids: list[int]
    line_hash: str = ""
    error: str | None = None


def read_prompts(engine: Engine, path: Path, key: str = "prompt", *, strict: bool = False) -> list[Prompt]:
    """The prompts of a JSONL file.

    Each line is an object with a text under `key`, or with `ids`, and with any other fields but those that its answer
    adds. A line that is none of these has its `error` set; with `strict` it raises `RequestError`, which an empty file
    always does.
    """
    prompts = []
    for number, data in enumerate(path.read_bytes().removeprefix(MARK).split(b"\n")):
        if not data.strip():
            continue
        prompt = parse_prompt(engine, number, data, key)
        if strict and prompt.error is not None:
            raise RequestError(f"{path}: line {number + 1}: {prompt.error}")
        prompts.append(prompt)
    if not prompts:
        raise RequestError(f"{path}: is empty; expected a {key} on each line")
    return prompts


def parse_prompt(engine: Engine, line: int, data: bytes, key: str = "prompt") -> Prompt:
    """The prompt of one line of a JSONL file, with its `error` where it has one."""
    prompt = Prompt(line, {}, [], hashlib.sha256(data).hexdigest()[:16])
    try:
        prompt.given = _parse(data, key)
    except RequestError as error:
        prompt.error = str(error)
        return prompt
    return check_prompt(engine, prompt, key)


def check_prompt(engine: Engine, prompt: Prompt, key: str = "prompt") -> Prompt:
    """The prompt with the ids of its object, or with its `error`."""
    try:
        _check_names(prompt.given, key)
        prompt.ids = _ids(engine, prompt.given, key)
    except RequestError as error:
        prompt.error = str(error)
    return prompt


def _parse(data: bytes, key: str) -> dict[str, Any]:
    try:
        given = json.loads(data.decode())
        json.dumps(given)  # what is nested too deeply for an answer is refused now
    except RecursionError:
        raise RequestError("is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(EXPECTED.format(key))
    return given


def _check_names(given: dict[str, Any], key: str) -> None:
    if (key in given) == ("ids" in given):
        raise RequestError(EXPECTED.format(key))
    if taken := [name for name in ANSWERS[key] if name in given]:
        raise RequestError(f"has {taken[0]}, which is what its answer adds; give it another name")


def _ids(engine: Engine, given: dict[str, Any], key: str) -> list[int]:
    if "ids" in given:
        return engine.check_prompt(given["ids"]).tolist()
    if not isinstance(given[key], str):
        raise RequestError(f"{key} is {type(given[key]).__name__}; expected a text")
    return engine.check_prompt(engine.encode(given[key])).tolist()


def finished_lines(path: Path, prompts: Sequence[Prompt]) -> set[int]:
    """The lines of `prompts` that the output file has already; a last line that was cut short is taken off it.

    An answer belongs to a prompt by the number and the hash of its line. Raises `RequestError` where the file answers
    other prompts.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    hashes, done = {prompt.line: prompt.line_hash for prompt in prompts}, set()
    for number, line in enumerate(whole.split(b"\n")[:-1]):
        try:
            answer = json.loads(line)
            found = answer["line"]
            same = hashes[found] == answer["line_hash"]
        except (ValueError, LookupError, TypeError, RecursionError):
            found, same = -1, False
        if not same:
            raise RequestError(f"{path}: line {number + 1} answers no line of the prompts; choose another --out")
        done.add(found)
    if len(whole) < len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    return done


def append_answers(path: Path, answers: Iterable[tuple[Prompt, dict[str, Any]]]) -> Iterator[int]:
    """Append a line for each answer as it comes; yields the number of its prompt's line.

    A line is the prompt's object with `line`, `line_hash` and the answer; of a prompt that has an error, these two and
    `error`. Lone surrogates, which UTF-8 cannot write, are written escaped.
    """
    with path.open("ab") as stream:
        for prompt, answer in answers:
            place = {"line": prompt.line, "line_hash": prompt.line_hash}
            record = {**place, "error": prompt.error} if prompt.error else {**prompt.given, **place, **answer}
            text = json.dumps(record, ensure_ascii=False)
            stream.write(SURROGATE.sub(lambda each: f"\\u{ord(each[0]):04x}", text).encode() + b"\n")
            stream.flush()
            yield prompt.line
