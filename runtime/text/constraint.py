"""Output that a grammar allows: masks over the vocabulary from llguidance, for a JSON schema, an expression, a grammar.

V vocabulary.
"""

import importlib.util
import json
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from runtime.errors import RequestError
from runtime.text.sandbox import Sandbox

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LARGEST_GRAMMAR = 256 << 10  # characters
SECONDS = 3.0  # to compile a grammar
# llguidance's own limits; a lexer state takes 1 to 2 kB
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
}
SPACE = r"[ \n\r\t]{1,16}"  # between JSON's tokens; without a bound a model can write spaces until the end


@dataclass(frozen=True)
class Grammar:
    """What the output must be. Made by `json_schema`, `json_object`, `regex` and `lark`.

    `kind` is the name of the function, `text` a schema as JSON, an expression or a Lark grammar.
    """

    kind: str
    text: str


def json_schema(schema: Mapping[str, Any] | str) -> Grammar:
    """JSON that a schema, or its text, allows. Raises `RequestError` for what is no JSON object."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if not isinstance(json.loads(text), dict):
            raise ValueError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON object: {error}") from error
    return Grammar("json_schema", text)


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar("json_object", '{"type": "object"}')


def regex(pattern: str) -> Grammar:
    """Text that matches an expression from its first character to its last, in the syntax of Rust's regex crate."""
    return Grammar("regex", pattern)


def lark(grammar: str) -> Grammar:
    """Text that a context-free grammar derives from its rule `start`, in llguidance's variant of Lark's syntax."""
    return Grammar("lark", grammar)


class GrammarConstraint:
    """Which tokens may come next in one sequence."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._first: np.ndarray | None = self._mask()

    def allowed(self) -> np.ndarray:
        """A mask (V,), bool, in which an end id is allowed where the text may end.

        Raises `RequestError` where the grammar needs more work than its limits allow.
        """
        mask, self._first = self._first, None
        return self._mask() if mask is None else mask

    def advance(self, token: int) -> None:
        """Take note of the chosen token. Raises `RequestError` for one that is not allowed, or as `allowed` does."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"the grammar fails at token {token}: {self._error()}")
        self._first = None

    def _mask(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the grammar fails: {self._error()}")
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(bool)

    def _error(self) -> str:
        return " ".join(self._matcher.get_error().split())[:300]


class Constraints:
    """The grammars of one tokenizer, whose texts an end id ends. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int, end_ids: Set[int]):
        self.vocabulary = vocabulary
        self._source, self._end_ids = tokenizer, sorted(end_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock, self._sandbox = threading.Lock(), Sandbox("grammar_job", "the grammar", SECONDS)

    def start(self, grammar: Grammar) -> GrammarConstraint:
        """A constraint for one sequence.

        Raises `RequestError` for a grammar that is wrong, that llguidance does not know, or that takes too much time
        or memory to compile; a child process tries it first.
        """
        if len(grammar.text) > LARGEST_GRAMMAR:
            raise RequestError(f"the grammar has {len(grammar.text)} characters; expected up to {LARGEST_GRAMMAR}")
        tokenizer = self._load()
        from llguidance import LLMatcher, LLParserLimits

        if grammar.kind == "regex":
            text = LLMatcher.grammar_from_regex(grammar.text)
        elif grammar.kind == "lark":
            text = LLMatcher.grammar_from_lark(grammar.text)
        else:
            try:
                text = LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": SPACE})
            except ValueError as error:
                raise RequestError(f"the JSON schema is refused: {error}") from error
        self._sandbox.ask(grammar=text, limits=LIMITS)
        limits = LLParserLimits(**LIMITS, verbose_errors=False)  # type: ignore[arg-type]
        return GrammarConstraint(LLMatcher(tokenizer, text, log_level=0, limits=limits), self.vocabulary)

    def close(self) -> None:
        """End the child process."""
        self._sandbox.close()

    def _load(self) -> "LLTokenizer":
        with self._lock:
            if self._tokenizer is not None:
                return self._tokenizer
            if self._source is None:
                raise RequestError("the artifact has no tokenizer, which constrained output needs")
            if not self._end_ids:
                raise RequestError("the artifact names no end-of-sequence id, which ends constrained output")
            if importlib.util.find_spec("llguidance") is None:
                raise RequestError("constrained output needs llguidance; pip install 'wm-models[serve]'")
            from llguidance import LLTokenizer

            plain = Tokenizer.from_str(self._source.to_str())
            plain.no_padding()
            plain.no_truncation()
            self._tokenizer = LLTokenizer(plain.to_str(), n_vocab=self.vocabulary, eos_token=self._end_ids)
            return self._tokenizer
