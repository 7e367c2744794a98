"""Chat messages to a prompt, by the checkpoint's own template, rendered in a child process with limits.

The template is `chat_template.jinja` or tokenizer_config.json's `chat_template`, which may be a list of named ones.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from runtime.artifact.manifest import Artifact
from runtime.errors import ArtifactError, RequestError
from runtime.text.sandbox import Sandbox

TEMPLATE, TOKENIZER_CONFIG, SPECIAL_TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
LARGEST_PROMPT = 1 << 20  # characters
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the standard one first

Message = Mapping[str, Any]


class ChatTemplate:
    """A checkpoint's template, `templates` by name, with the special tokens that it may write."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, Any], sandbox: Sandbox | None = None):
        self.templates, self.special_tokens = dict(templates), dict(special_tokens)
        self.sandbox = sandbox or Sandbox("chat_job", "the chat template")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, which holds every special token: encode it without adding any.

        `messages`: objects with `role`, `content` and whatever else the template reads. `tools`: JSON schemas of
        functions. `variables`: further names that the template knows. What transformers' `apply_chat_template`
        renders. Raises `RequestError`.
        """
        if isinstance(messages, str | bytes) or not messages or not all(isinstance(each, Mapping) for each in messages):
            raise RequestError("messages are empty or no list of objects; expected objects with a role and a content")
        if importlib.util.find_spec("jinja2") is None:
            raise RequestError("chat templates need jinja2; pip install 'wm-models[serve]'")
        known = {
            **self.special_tokens,
            **(variables or {}),
            "messages": [_message(each) for each in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self.sandbox.ask(template=self._choose(tools is not None), variables=known, limit=LARGEST_PROMPT)
        except TypeError as error:  # what JSON cannot hold
            raise RequestError(f"a message holds what is no JSON: {error}") from error

    def _choose(self, with_tools: bool) -> str:
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                f"the chat templates are {', '.join(sorted(self.templates))}; expected one named default"
            )
        return self.templates[name]


def load_chat_template(artifact: Artifact) -> ChatTemplate | None:
    """The artifact's chat template, or None where it has none. Raises `ArtifactError` for one of another form."""
    config = artifact.read_json(TOKENIZER_CONFIG)
    found = config.get("chat_template")
    if TEMPLATE in artifact.texts:
        found = artifact.texts[TEMPLATE].decode(errors="replace")
    if found is None:
        return None
    templates: dict[Any, Any] = {"default": found}
    if isinstance(found, list):
        templates = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if not templates or {type(part) for pair in templates.items() for part in pair} != {str}:
        raise ArtifactError(
            f"{artifact.path / TOKENIZER_CONFIG}: chat_template is {str(found)[:60]!r}; expected a text, or a list of "
            "objects with name and template"
        )
    return ChatTemplate(templates, _special_tokens({**artifact.read_json(SPECIAL_TOKENS), **config}))


def encode_chat(
    template: ChatTemplate | None,
    tokenizer: Tokenizer | None,
    artifact: Artifact,
    messages: Sequence[Message],
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a prompt for the assistant's next message. Raises `RequestError` where there is no template."""
    if template is None or tokenizer is None:
        raise RequestError(
            f"{artifact.path}: has no chat template ({TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}) or no "
            "tokenizer; give a prompt instead of messages"
        )
    return tokenizer.encode(template.render(messages, variables=variables), add_special_tokens=False).ids


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token` and the like, as templates know them: texts, though files may hold objects with `content`."""
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens


def _message(message: Message) -> dict[str, Any]:
    """A message without its nulls, its reasoning under each of the names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}
