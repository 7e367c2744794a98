"""Chat templates: the same text as transformers renders, and a bounded end for templates that misbehave."""

import json
from pathlib import Path

import pytest

from runtime.artifact.folder import Folder
from runtime.artifact.manifest import Artifact, Graph
from runtime.errors import ArtifactError, RequestError
from runtime.text.chat import ChatTemplate, load_chat_template
from runtime.text.sandbox import Sandbox
from test_serve.chats import CALLS, CHATML, CONVERSATIONS, ENDLESS, HUGE_MEMORY, HUGE_TEXT, TEMPLATES, TOOLS
from wm_models import shipped_tokenizer


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox("chat_job", "the chat template", seconds=30)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer():
    return shipped_tokenizer()


@pytest.fixture
def template(tokenizer, sandbox):
    """`template(text)`: a chat template of that text, the same in transformers' tokenizer and in this package."""

    def make(text):
        tokenizer.chat_template = text
        named = text if isinstance(text, dict) else {"default": text}
        return ChatTemplate(named, tokenizer.special_tokens_map, sandbox)

    return make


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name, conversation, generation, tokenizer, template):
    messages, ours = CONVERSATIONS[conversation], template(TEMPLATES[name])
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert ours.render(messages, add_generation_prompt=generation) == expected
    assert messages[-1]["content"].strip() in expected


def test_tools_and_their_calls_render_as_in_transformers(tokenizer, template):
    ours = template(TEMPLATES["Qwen"])
    expected = tokenizer.apply_chat_template(
        CALLS, tools=TOOLS, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert ours.render(CALLS, tools=TOOLS, variables={"enable_thinking": False}) == expected
    assert "<today> & tomorrow" in expected
    assert "21 °C" in expected


def test_reasoning_has_the_names_that_templates_read(tokenizer, template):
    messages, ours = [{"role": "assistant", "reasoning": "Hm.", "content": "Yes."}], template(TEMPLATES["Qwen"])
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ours.render(messages, add_generation_prompt=False) == expected
    assert "Hm." in expected


def test_named_templates_are_chosen_as_in_transformers(tokenizer, template):
    ours, messages = template({"default": CHATML, "tool_use": TEMPLATES["Qwen"]}), CONVERSATIONS["system"]
    for tools in (None, TOOLS):
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages, tools=tools) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "more than 0.5 s"),
        (HUGE_TEXT, "writes more than 1048576 characters"),
        (HUGE_MEMORY, "memory"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set x = namespace(_a=1) %}", "underscore"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only one system message') }}", "only one system message"),
    ],
)
def test_a_template_that_misbehaves_ends_in_an_error_and_the_next_one_renders(template, message):
    sandbox = Sandbox("chat_job", "the chat template", seconds=30)
    try:
        sandbox.ask(template="{{ 1 }}", variables={}, limit=1)  # the start of the child is not what is timed
        sandbox.seconds = 0.5 if template == ENDLESS else 30
        with pytest.raises(RequestError, match=message):
            ChatTemplate({"default": template}, {}, sandbox).render(CONVERSATIONS["one turn"])
        sandbox.seconds = 30
        assert sandbox.ask(template="{{ 1 + 1 }}", variables={}, limit=1) == "2"
    finally:
        sandbox.close()


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"role": "user", "content": {1, 2}}]])
def test_what_are_no_messages_is_refused(messages, sandbox):
    with pytest.raises(RequestError, match="message"):
        ChatTemplate({"default": CHATML}, {}, sandbox).render(messages)


def artifact(files: dict[str, object]) -> Artifact:
    texts = {name: text if isinstance(text, bytes) else json.dumps(text).encode() for name, text in files.items()}
    return Artifact(Path("somewhere"), b"", "doge", 0, Graph.__new__(Graph), {}, {}, texts, True, Folder(Path()), {})


def test_the_template_is_found_where_checkpoints_keep_it(sandbox):
    assert load_chat_template(artifact({"tokenizer_config.json": {"bos_token": "<s>"}})) is None
    both = {"chat_template.jinja": b"{{ bos_token }}file", "tokenizer_config.json": {"chat_template": "config"}}
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    for files, expected in (
        (both, "file"),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": named}}, "plain"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": "{{ bos_token }}{{ eos_token }}",
                    "bos_token": {"content": "<s>", "lstrip": False},
                },
                "special_tokens_map.json": {"eos_token": "</s>", "bos_token": "other"},
            },
            "<s></s>",
        ),
    ):
        template = load_chat_template(artifact(files))
        assert template is not None
        template.sandbox = sandbox
        assert template.render(CONVERSATIONS["one turn"]) == expected
    with pytest.raises(ArtifactError, match="chat_template"):
        load_chat_template(artifact({"tokenizer_config.json": {"chat_template": [{"name": "default"}]}}))


def test_special_tokens_are_those_of_transformers(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    texts = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json"}
    template = load_chat_template(artifact({**texts, "chat_template.jinja": CHATML.encode()}))
    assert template is not None
    assert template.special_tokens == tokenizer.special_tokens_map
