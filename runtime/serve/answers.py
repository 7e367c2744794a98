"""Answers in the OpenAI API's form: whole ones, and the pieces of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from runtime.errors import RequestError
from runtime.scheduling.request import Event, Logprob
from runtime.serve.errors import ApiError
from runtime.text.tokenizer import decode

DONE = b"data: [DONE]\n\n"


def frame(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Choice:
    """One sequence of an answer as far as it is known. `sent`: characters that its logprobs cover already."""

    index: int
    prompt: int
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: Sequence[Logprob | None] = ()
    ended_by: Logprob | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    sent: int = 0

    def take(self, event: Event) -> None:
        """Note what an event brings."""
        if event.text:
            self.text.append(event.text)
        if event.token is not None and event.logprob is not None:
            self.logprobs.append(Logprob(event.token, event.logprob, event.top_logprobs))
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.ended_by = event.ended_by
        self.finish_reason = event.finish_reason
        self.prompt_tokens, self.new_tokens = event.prompt_tokens, event.new_tokens
        self.reused_tokens = event.reused_tokens


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """The tokens of an answer; those of a prompt count once, however many choices it has."""
    prompts = {choice.prompt: choice.prompt_tokens for choice in choices}
    reused = {choice.prompt: choice.reused_tokens for choice in reversed(choices)}
    new = sum(choice.new_tokens for choice in choices)
    return {
        "prompt_tokens": sum(prompts.values()),
        "completion_tokens": new,
        "total_tokens": sum(prompts.values()) + new,
        "prompt_tokens_details": {"cached_tokens": sum(reused.values())},
    }


class Answer:
    """What the answers of completions and of chat completions share. `logprobs`: how many, None for none."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer | None, logprobs: int | None):
        self.model, self.tokenizer, self.count = model, tokenizer, logprobs
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        made = [self.choice(each) for each in sorted(choices, key=lambda each: each.index)]
        return {**self._head(self.kind), "choices": made, "usage": usage(choices)}

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        """What a stream has before the first event of a choice."""
        return []

    def piece(self, choice: Choice, event: Event) -> dict[str, Any]:
        """What a stream has for an event that the choice has taken."""
        raise NotImplementedError

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A stream's last piece, with the usage."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": usage(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self.chunk_kind), "choices": [choice]}

    def spelt(self, token: int) -> str:
        """A token's text alone; its id where there is no tokenizer. Raises `ApiError` where it cannot be written."""
        if self.tokenizer is None:
            return str(token)
        try:
            return decode(self.tokenizer, [token], special=True)
        except RequestError as error:
            raise ApiError(500, str(error)) from error


class CompletionAnswer(Answer):
    """Of `/v1/completions`. `echoes`: a text for each prompt to begin its choices with, where that is asked for."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, tokenizer: Tokenizer | None, logprobs: int | None, echoes: Sequence[str] | None,
        ids: Sequence[Sequence[int]],
    ):  # fmt: skip
        super().__init__(model, tokenizer, logprobs)
        self.echoes, self.ids = echoes, ids

    def choice(self, choice: Choice) -> dict[str, Any]:
        text = ("" if self.echoes is None else self.echoes[choice.prompt]) + "".join(choice.text)
        known = None
        if self.count is not None:
            choice.sent = 0
            known = self._logprobs(choice, [*self._of_prompt(choice), *choice.logprobs, *self._end(choice)])
        return self._choice(choice, text, known)

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        if self.echoes is None:
            return []
        known = None if self.count is None else self._logprobs(choice, self._of_prompt(choice))
        made = self._choice(choice, self.echoes[choice.prompt], known)
        return [self._chunk({**made, "finish_reason": None})]

    def piece(self, choice: Choice, event: Event) -> dict[str, Any]:
        known = None
        if self.count is not None:
            known = self._logprobs(choice, choice.logprobs[-1:] if event.token is not None else [])
        return self._chunk(self._choice(choice, event.text, known))

    def _choice(self, choice: Choice, text: str, known: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": known, "finish_reason": choice.finish_reason}

    def _of_prompt(self, choice: Choice) -> list[Logprob | None]:
        return [] if self.echoes is None else list(choice.prompt_logprobs)

    def _end(self, choice: Choice) -> list[Logprob]:
        """The end-of-sequence token, after an echo: clients that score a prompt leave out the last entry unseen."""
        return [] if self.echoes is None or choice.ended_by is None else [choice.ended_by]

    def _logprobs(self, choice: Choice, known: Sequence[Logprob | None]) -> dict[str, Any]:
        ids = [self.ids[choice.prompt][0] if each is None else each.token for each in known]
        tokens, offsets = [self.spelt(token) for token in ids], []
        for token in tokens:
            offsets.append(choice.sent)
            choice.sent += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if each is None else each.logprob for each in known],
            "top_logprobs": [
                None if each is None else {self.spelt(token): value for token, value in reversed(each.top)}
                for each in known
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        known = None if self.count is None else self._logprobs(choice.logprobs)
        return {
            "index": choice.index, "message": message, "logprobs": known, "finish_reason": choice.finish_reason
        }  # fmt: skip

    def begin(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._chunk(self._delta(choice, {"role": "assistant", "content": ""}, None, None))]

    def piece(self, choice: Choice, event: Event) -> dict[str, Any]:
        known = None
        if self.count is not None and event.token is not None:
            known = self._logprobs(choice.logprobs[-1:])
        delta = {"content": event.text} if event.text or event.finish_reason is None else {}
        return self._chunk(self._delta(choice, delta, known, event.finish_reason))

    def _delta(self, choice: Choice, delta: dict[str, Any], known: Any, reason: str | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": known, "finish_reason": reason}

    def _logprobs(self, known: Sequence[Logprob]) -> dict[str, Any]:
        entries = []
        for each in known:
            top = [self._entry(token, value) for token, value in each.top]
            entries.append({**self._entry(each.token, each.logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spelt(token)
        known = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}
