"""Instructions out of source code: "Write a function that …", from a docstring's first sentence, and the function."""

import ast
import textwrap
from collections.abc import Iterator, Sequence

from wm_models.training.chats import ASSISTANT, Chat
from wm_models.training.data import Document, read_documents

LONGEST = 4000  # characters of a function
SHORTEST_SENTENCE, LONGEST_SENTENCE = 3, 40  # words
# First words of docstrings that are no verbs
NO_VERBS = frozenset([
    "a", "abstract", "all", "an", "and", "any", "are", "as", "base", "called", "callback", "class", "common",
    "default", "dictionary", "empty", "equal", "false", "for", "function", "given", "helper", "how", "if", "in",
    "internal", "is", "it", "like", "list", "method", "new", "no", "not", "note", "now", "number", "of", "on",
    "one", "only", "private", "public", "same", "see", "similar", "simple", "some", "string", "subclasses", "the",
    "this", "true", "two", "used", "utility", "version", "when", "where", "with", "wrapper", "you",
])  # fmt: skip


def read_instructions(exclude: Sequence[str], skip_bad: bool) -> list[Chat]:
    """A chat for every documented function and method of the standard library, named "file:function"."""
    found: list[Chat] = []
    seen: set[str] = set()
    for document in read_documents((), exclude, skip_bad):
        for chat in instructions(document):
            answer = chat.messages[1]["content"]
            if answer not in seen:  # modules that are copies of each other
                seen.add(answer)
                found.append(chat)
    return found


def instructions(document: Document) -> Iterator[Chat]:
    """The chats of a Python source; none of one that does not parse."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            request = _request(ast.get_docstring(node) or "")
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
            if request and len(source) <= LONGEST:
                messages = [{"role": "user", "content": request}, {"role": ASSISTANT, "content": source}]
                yield Chat(f"{document.name}:{node.name}", messages)


def _request(docstring: str) -> str:
    """What to ask for a function of that docstring; "" where its first sentence does not begin with a verb."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".:")
    words = sentence.split()
    if not SHORTEST_SENTENCE <= len(words) <= LONGEST_SENTENCE or not words[0].istitle():
        return ""
    if not words[0].isalpha() or words[0].lower() in NO_VERBS:
        return ""
    return " ".join(["Write a function that", _third_person(words[0].lower()), *words[1:]]) + "."


def _third_person(verb: str) -> str:
    """The verb as "a function that" takes it: "return" and "returns" become "returns"."""
    if verb.endswith("s") and not verb.endswith("ss"):
        return verb
    if verb.endswith(("ss", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2:-1] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"
