"""Chats out of files: messages to tokens by the tokenizer's template, and which of them the answers are.

S tokens of a row.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from wm_models.training.data import files, json_rows, matches
from wm_models.training.errors import TrainingError
from wm_models.training.rows import Rows

TEMPLATES = Path(__file__).parent / "templates"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


class Chat(NamedTuple):
    """Messages with a role and a content each, of which the assistant's are to be learned."""

    name: str  # its file's path below the folder it was found in, ":" and its line
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None  # JSON schemas of functions, for the template


class Encoded(NamedTuple):
    """A chat's tokens, and which of them are answers."""

    ids: list[int]
    answers: list[bool]


def read_rows(sources: Sequence[str], exclude: Sequence[str]) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Every line's object in the .jsonl files of files, folders and globs: its name, file, line and value.

    `exclude` are patterns of names, as in `fnmatch`. Raises `TrainingError` for other kinds of files, and for no lines.
    """
    found = False
    for source in sources:
        for root, file in files(source):
            if file.suffix != ".jsonl":
                raise TrainingError(f"{file}: cannot be chats; expected .jsonl, an object with messages on each line")
            for number, value in json_rows(file):
                if not isinstance(value, dict):
                    raise TrainingError(f"{file}:{number}: is a {type(value).__name__}; expected a JSON object")
                name = f"{file.relative_to(root).as_posix()}:{number}"
                if not matches(name, exclude):
                    found = True
                    yield name, file, number, value
    if not found:
        raise TrainingError(f"no chats found in {', '.join(sources)}; expected .jsonl files that are not empty")


def read_chats(sources: Sequence[str], exclude: Sequence[str] = ()) -> list[Chat]:
    """The chats of .jsonl files, `{"messages": [{"role": …, "content": …}, …]}` on each line, perhaps with `tools`.

    Raises `TrainingError`, naming the line, for what has no messages or none of the assistant's.
    """
    chats = []
    for name, file, number, row in read_rows(sources, exclude):
        messages = check_messages(row.get("messages"), f"{file}:{number}: messages")
        if not any(message["role"] == ASSISTANT for message in messages):
            raise TrainingError(f"{file}:{number}: has no message of role {ASSISTANT}, so there is nothing to learn")
        chats.append(Chat(name, messages, row.get("tools")))
    return chats


def check_messages(found: Any, where: str) -> list[dict[str, Any]]:
    """`found` as it is. Raises `TrainingError` unless it is a list of objects with a role."""
    if not isinstance(found, list) or not found:
        raise TrainingError(f"{where} is {str(found)[:40]!r}; expected a list of objects with role and content")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TrainingError(f"{where} has {str(message)[:40]!r}; expected an object with role and content")
    return found


def set_template(tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Give the tokenizer the template of a file, or the shipped one of that name; "" leaves its own.

    Raises `TrainingError` where it then has none.
    """
    if source:
        path = Path(source)
        if not path.is_file():
            path = TEMPLATES / f"{source}.jinja"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
            raise TrainingError(f"{source}: no chat template; expected a Jinja file or one of {names}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not isinstance(tokenizer.chat_template, str):
        raise TrainingError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; name one with --chat-template"
        )


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """A chat's tokens by the tokenizer's template.

    Where the template marks answers with `{% generation %}`, these are what it marks. Otherwise an answer is what a
    message of the assistant adds to the prompt for it, up to its last special token. Raises `TrainingError`, naming the
    chat, for a template that renders a prompt in another way alone than within the chat, and for answers that no
    special token ends: a model that learned those would not stop.
    """
    try:
        if MARKED.search(str(tokenizer.chat_template)):
            encoded = _encode_marked(chat, tokenizer)
        else:
            encoded = _encode_by_prefix(chat, tokenizer)
    except TemplateError as error:
        raise TrainingError(f"{chat.name}: the chat template refuses it: {error}") from error
    if not any(encoded.answers):
        raise TrainingError(f"{chat.name}: the chat template marks no token of an answer; expected {{% generation %}}")
    answer_end(encoded, tokenizer, chat.name)
    return encoded


def answer_end(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """The special token that ends the last answer. Raises `TrainingError` where another token does."""
    last = max(index for index, answer in enumerate(encoded.answers) if answer)
    token = encoded.ids[last]
    if token not in tokenizer.all_special_ids:
        raise TrainingError(
            f"{name}: the last answer ends with {tokenizer.decode([token])!r}, which is no special token; the model "
            "would not learn to stop: let the chat template end an answer with one, within {% generation %}"
        )
    return token


def prompt_ids(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The prompt for the chat's first answer."""
    first = next(index for index, message in enumerate(chat.messages) if message["role"] == ASSISTANT)
    text = _render(chat, tokenizer, first, True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _encode_marked(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    found: Any = tokenizer.apply_chat_template(
        chat.messages,
        tools=chat.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return Encoded(found["input_ids"], [bool(answer) for answer in found["assistant_masks"]])


def _encode_by_prefix(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    text = _render(chat, tokenizer, len(chat.messages), False)
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answers = np.zeros(len(found.input_ids), dtype=bool)
    starts, ends = np.array(found.offset_mapping).T
    special = np.isin(found.input_ids, tokenizer.all_special_ids)
    for index, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT:
            continue
        before = _render(chat, tokenizer, index, True)
        after = _render(chat, tokenizer, index + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise TrainingError(
                f"{chat.name}: the chat template renders message {index + 1} in another way alone than within the "
                "chat, so its answer cannot be told from the prompt; mark answers with {% generation %}"
            )
        within = (starts >= len(before)) & (ends <= len(after))
        if (within & special).any():
            within[np.flatnonzero(within & special)[-1] + 1 :] = False
        answers |= within
    return Encoded(found.input_ids, answers.tolist())


def _render(chat: Chat, tokenizer: PreTrainedTokenizerFast, count: int, add_generation_prompt: bool) -> str:
    """The text of the first `count` messages."""
    if not count:
        return ""
    text = tokenizer.apply_chat_template(
        chat.messages[:count],
        tools=chat.tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)


def pack_chats(encoded: Sequence[Encoded], length: int, pad: int) -> Rows:
    """Whole chats side by side in rows of `length` tokens, none of which may be longer: each sees itself alone."""
    from datasets import Dataset
    from trl import pack_dataset

    columns = {
        "input_ids": [each.ids for each in encoded],
        "labels": [list(map(int, each.answers)) for each in encoded],
    }
    packed: Any = pack_dataset(Dataset.from_dict(columns), length)
    shape = len(packed), length
    ids, positions = np.full(shape, pad, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    answers, lengths = np.zeros(shape, dtype=bool), np.zeros(len(packed), dtype=np.int64)
    for row, item in enumerate(packed):
        count = lengths[row] = len(item["input_ids"])
        ids[row, :count], answers[row, :count] = item["input_ids"], item["labels"]
        sizes = [*item["seq_lengths"], length - count]
        positions[row] = np.concatenate([np.arange(size) for size in sizes])
    return Rows(ids, positions, lengths, answers)
