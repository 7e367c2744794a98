"""Bodies of requests to typed calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.errors import RequestError
from runtime.serve.errors import ApiError
from runtime.serve.fields import Fields, refuse
from runtime.text.constraint import Grammar, json_object, json_schema, lark, regex
from runtime.text.sampling import Sampling

MOST_LOGPROBS, MOST_STOPS, MOST_TEMPERATURE, SEEDS = 20, 16, 100.0, 1 << 64
GUIDED: dict[str, Callable[[Any], Grammar]] = {
    "guided_json": json_schema, "guided_regex": regex, "guided_grammar": lark
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What completions and chat completions have in common.

    `choices`: continuations of each prompt, `n`. `max_tokens`: None for all that the artifact holds. `logprobs`: None,
    or how many of the most probable tokens come with each token. `deadline`: seconds, None for the server's.
    """

    model: str | None
    choices: int
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    logit_bias: dict[int, float]
    logprobs: int | None
    grammar: Grammar | None
    stream: bool
    stream_usage: bool
    deadline: float | None


@dataclass(frozen=True)
class CompletionCall:
    """`prompts`: texts, or ids, one for each prompt. `echo`: whether the answer begins with the prompt."""

    call: Call
    prompts: list[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class ChatCall:
    """`variables`: further names for the chat template."""

    call: Call
    messages: list[dict[str, Any]]
    variables: dict[str, Any]


def parse_completion(body: dict[str, Any], most_choices: int) -> CompletionCall:
    """The call of `/v1/completions`. Raises `ApiError`."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt"))
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 16, 0)
    call = _call(fields, max_tokens, logprobs, most_choices // len(prompts))
    fields.end()
    if len(prompts) > most_choices:
        raise ApiError(400, f"prompt has {len(prompts)} prompts; expected up to {most_choices}", "prompt")
    return CompletionCall(call, prompts, echo)


def parse_chat(body: dict[str, Any], most_choices: int) -> ChatCall:
    """The call of `/v1/chat/completions`. Raises `ApiError`."""
    fields = Fields(body)
    messages = parse_messages(fields.take("messages"))
    variables = fields.take("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        refuse("chat_template_kwargs", variables, "an object")
    old = fields.integer("max_tokens", None, 1)
    max_tokens = fields.integer("max_completion_tokens", None, 1)
    if old is not None and max_tokens is not None and old != max_tokens:
        raise ApiError(400, f"max_tokens is {old} and max_completion_tokens {max_tokens}; give one", "max_tokens")
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    call = _call(fields, old if max_tokens is None else max_tokens, (top or 0) if wanted else None, most_choices)
    fields.end()
    return ChatCall(call, messages, variables)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with texts as their content: a list of parts becomes one text. Raises `ApiError`."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        refuse("messages", value, "a list of objects with role and content, at least one")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        refuse(f"{where}.role", message.get("role"), "a text")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                refuse(f"{where}.content", part, "parts of type text; this server reads nothing else")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        refuse(f"{where}.content", content, "a text or a list of text parts")
    return {**message, "content": content}


def _prompts(value: Any) -> list[str | list[int]]:
    values = value if isinstance(value, list) and value and not _is_ids(value) else [value]
    for prompt in values:
        if not isinstance(prompt, str) and not _is_ids(prompt):
            refuse("prompt", value, "a text, token ids, or a list of either")
    return values


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _call(fields: Fields, max_tokens: int | None, logprobs: int | None, most: int) -> Call:
    stream = fields.flag("stream")
    seed = fields.integer("seed", None, -SEEDS // 2, SEEDS - 1)
    try:
        sampling = Sampling(
            fields.number("temperature", 1.0, 0.0, MOST_TEMPERATURE),
            fields.integer("top_k", 0, 0),
            fields.number("top_p", 1.0, 0.0, 1.0),
            fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
            None if seed is None else seed % SEEDS,
        )
    except RequestError as error:
        raise ApiError(400, str(error)) from error
    return Call(
        fields.text("model"),
        fields.integer("n", 1, 1, max(1, most)),
        max_tokens,
        sampling,
        fields.texts("stop", MOST_STOPS),
        fields.biases("logit_bias"),
        logprobs,
        _grammar(fields),
        stream,
        _stream_usage(fields, stream),
        fields.number("deadline", None, 0.0, 1e9),
    )


def _stream_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        refuse("stream_options", value, "an object, with stream true")
    options = Fields(value)
    usage = options.flag("include_usage")
    if options.flag("include_obfuscation"):
        raise ApiError(400, "stream_options.include_obfuscation is not supported by this server", "stream_options")
    options.end()
    return usage


def _grammar(fields: Fields) -> Grammar | None:
    given = [(name, fields.take(name)) for name in GUIDED]
    given = [(name, value) for name, value in given if value is not None]
    form = fields.take("response_format")
    if len(given) + (form is not None) > 1:
        raise ApiError(400, f"{given[0][0]} and another constraint are given; expected one", given[0][0])
    try:
        for name, value in given:
            if not isinstance(value, str) and not (name == "guided_json" and isinstance(value, dict)):
                refuse(name, value, "a text")
            return GUIDED[name](value)
        return None if form is None else _response_format(form)
    except RequestError as error:
        raise ApiError(400, str(error), given[0][0] if given else "response_format") from error


def _response_format(form: Any) -> Grammar | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_object()
    if kind != "json_schema":
        refuse("response_format", form, 'an object whose type is "text", "json_object" or "json_schema"')
    described = form.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        refuse("response_format.json_schema", described, "an object with a schema")
    return json_schema(described["schema"])
