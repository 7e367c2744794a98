"""Chats: the tokens of answers, and no others, are what is learned."""

import itertools
import json

import pytest
from test_serve.chats import CHATML
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template

from wm_models import shipped_checkpoint, shipped_tokenizer
from wm_models.training.chats import Chat, encode_chat, pack_chats, prompt_ids, read_chats, set_template
from wm_models.training.data import Document
from wm_models.training.errors import TrainingError
from wm_models.training.instructions import instructions
from wm_models.training.rows import IGNORED

MESSAGES = [
    {"role": "system", "content": "Answer in Python."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "x = 1"},
    {"role": "user", "content": "x = 1, and two?"},
    {"role": "assistant", "content": "y = 2\n"},
]


@pytest.fixture
def tokenizer():
    found = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def answers(encoded, tokenizer):
    """The runs of tokens that are answers, as texts."""
    runs, before = [], False
    for token, answer in zip(encoded.ids, encoded.answers, strict=True):
        if answer and not before:
            runs.append([])
        if answer:
            runs[-1].append(token)
        before = answer
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, "chatml"], ids=["by prefix", "marked"])
def test_the_answers_and_their_ends(tokenizer, template):
    if template == CHATML:
        tokenizer.chat_template = template
    else:
        set_template(tokenizer, template)
    encoded = encode_chat(Chat("a", MESSAGES), tokenizer)
    assert answers(encoded, tokenizer) == ["x = 1<|im_end|>", "y = 2\n<|im_end|>"]
    assert encoded.ids == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    prompt = prompt_ids(Chat("a", MESSAGES), tokenizer)
    assert prompt == tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True)["input_ids"]
    assert prompt == encoded.ids[: len(prompt)]
    assert not any(encoded.answers[: len(prompt)])
    assert encoded.answers[len(prompt)]


def test_marks_are_transformers_own(tokenizer):
    set_template(tokenizer, "chatml")
    found = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_chat(Chat("a", MESSAGES), tokenizer).answers == [bool(mark) for mark in found["assistant_masks"]]
    assert get_training_chat_template(tokenizer) is None  # it is one that TRL can train with


LAST_ALONE = (
    "{% for message in messages %}{{ message.role + (' (last)' if loop.last else '') + ': ' + message.content + "
    "eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LAST_ALONE, "renders message 3 in another way alone than within the chat"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", "marks no token"),
        ("{{ raise_exception('no system message') }}", "refuses it: no system message"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(tokenizer, template, words):
    tokenizer.chat_template = template
    with pytest.raises(TrainingError, match=f"chats.jsonl:7: .*{words}"):
        encode_chat(Chat("chats.jsonl:7", MESSAGES), tokenizer)


def test_a_tokenizer_without_a_template_names_the_option():
    with pytest.raises(TrainingError, match="--chat-template"):
        set_template(shipped_tokenizer(), "")
    with pytest.raises(TrainingError, match="expected a Jinja file or one of chatml"):
        set_template(shipped_tokenizer(), "none")


def test_rows_hold_whole_chats(tokenizer):
    """Every answer's token has a label once, in a row where its chat begins at position 0."""
    tokenizer.chat_template = CHATML
    chats = [Chat(str(number), MESSAGES[: 3 + 2 * (number % 2)]) for number in range(9)]
    encoded = [encode_chat(chat, tokenizer) for chat in chats]
    length = max(len(each.ids) for each in encoded) + 7
    rows = pack_chats(encoded, length, 2)
    found, expected = [], []
    for row in range(len(rows)):
        item = rows[row]
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), length]
        for start, end in itertools.pairwise(starts):
            labels = item["labels"][start:end]
            if (labels != IGNORED).any():
                found.append((item["input_ids"][start:end].tolist(), labels[labels != IGNORED].tolist()))
    for each in encoded:
        expected.append((each.ids, [token for token, answer in zip(each.ids, each.answers, strict=True) if answer]))
    assert sorted(found) == sorted(expected)
    assert rows.targets == sum(len(labels) for _, labels in expected)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "is a list; expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"messages": "hello"}', "messages is 'hello'; expected a list"),
        ('{"messages": [{"content": "a"}]}', "expected an object with role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n" + line + "\n")
    with pytest.raises(TrainingError, match=rf"chats.jsonl:2: .*{words}"):
        read_chats([str(path)])


def test_other_files_and_empty_ones(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(TrainingError, match="cannot be chats"):
        read_chats([str(tmp_path / "a.txt")])
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(TrainingError, match="no chats found"):
        read_chats([str(tmp_path / "b.jsonl")])


SOURCE = '''
class Heap:
    @property
    def smallest(self):
        """Return the smallest item.

        Raises IndexError where there is none.
        """
        return self.items[0]

    def push(self, item):
        """Push an item. It may be anything."""

def apply():
    """Does nothing but this."""

def hidden():
    """the docstring that begins with no verb"""

def tried():
    """Try again and again:"""
'''


def test_instructions_from_docstrings():
    """Asked for what its docstring says, the whole function is the answer."""
    found = {
        chat.name: [message["content"] for message in chat.messages] for chat in instructions(Document("a.py", SOURCE))
    }
    assert {name: request for name, (request, _) in found.items()} == {
        "a.py:smallest": "Write a function that returns the smallest item.",
        "a.py:push": "Write a function that pushes an item.",
        "a.py:apply": "Write a function that does nothing but this.",
        "a.py:tried": "Write a function that tries again and again.",
    }
    answer = found["a.py:smallest"][1]
    assert answer.startswith("@property\ndef smallest(self):\n    ")
    assert answer.endswith("    return self.items[0]")
    assert not list(instructions(Document("b.py", "def broken(")))
