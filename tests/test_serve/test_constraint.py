"""Constrained output: random tokens that the masks allow end in text that parses, and costly grammars are refused."""

import ast
import json
import re

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from runtime.errors import RequestError
from runtime.text.constraint import LARGEST_GRAMMAR, Constraints, Grammar, json_object, json_schema, lark, regex
from wm_models import shipped_checkpoint

END, VOCABULARY = 1, 3100  # more rows than the tokenizer has tokens, as some models have
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["näh", "b c", '"']}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"const": {"x": 1.5}}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
}
SUM = """
start: term (("+" | "-") term)*
term: NUMBER | "(" start ")"
NUMBER: /[1-9][0-9]{0,3}/
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(shipped_checkpoint() / "tokenizer.json"))


@pytest.fixture(scope="module")
def constraints(tokenizer):
    made = Constraints(tokenizer, VOCABULARY, {END})
    yield made
    made.close()


def walk(constraints, grammar: Grammar, seed: int, most: int = 400) -> list[int] | None:
    """Tokens drawn evenly from what is allowed, the end wherever it is; None where the text has not ended by then."""
    draw, constraint, tokens = np.random.default_rng(seed), constraints.start(grammar), []
    for _ in range(most):
        allowed = constraint.allowed()
        assert allowed.shape == (VOCABULARY,)
        assert allowed.dtype == bool
        assert not allowed[3072:].any()
        if allowed[END]:
            return tokens
        tokens.append(int(draw.choice(np.flatnonzero(allowed))))
        constraint.advance(tokens[-1])
    return None


def texts(constraints, tokenizer, grammar: Grammar, count: int = 12) -> list[str]:
    """The texts of those walks that ended, which are most."""
    found = [walk(constraints, grammar, seed) for seed in range(count)]
    ended = [tokenizer.decode(tokens) for tokens in found if tokens is not None]
    assert len(ended) > count // 2
    return ended


def test_a_schema_is_obeyed(constraints, tokenizer):
    for text in texts(constraints, tokenizer, json_schema(PERSON)):
        jsonschema.validate(json.loads(text), PERSON)


def test_a_schema_may_be_text_and_has_the_same_masks(constraints):
    one, other = constraints.start(json_schema(PERSON)), constraints.start(json_schema(json.dumps(PERSON)))
    assert np.array_equal(one.allowed(), other.allowed())
    assert np.array_equal(one.allowed(), one.allowed())


def test_a_json_object_is_an_object(constraints, tokenizer):
    constraint = constraints.start(json_object())
    for token in tokenizer.encode('{"a": [1, {"b": null}], "c": "ü"}').ids:
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert np.flatnonzero(constraint.allowed()).tolist() == [END]
    constraint = constraints.start(json_object())
    assert not constraint.allowed()[tokenizer.encode("[").ids].any()


def test_white_space_is_bounded(constraints, tokenizer):
    constraint, token = constraints.start(json_object()), tokenizer.encode(" ").ids[0]
    constraint.advance(tokenizer.encode("{").ids[0])
    count = 0
    while constraint.allowed()[token]:
        constraint.advance(token)
        count += 1
        assert count < 100
    assert count > 0


def test_an_expression_is_obeyed(constraints, tokenizer):
    pattern = r"(ab|[x-z]{2,4}é?)+;[0-9]{1,3}"
    for text in texts(constraints, tokenizer, regex(pattern)):
        assert re.fullmatch(pattern, text)


def test_a_lark_grammar_is_obeyed(constraints, tokenizer):
    for text in texts(constraints, tokenizer, lark(SUM)):
        assert eval(compile(ast.parse(text, mode="eval"), "sum", "eval")) is not None
        assert set(text) <= set("0123456789+-()")


def test_a_token_that_is_not_allowed_is_an_error(constraints, tokenizer):
    constraint = constraints.start(json_object())
    with pytest.raises(RequestError, match="fails at token"):
        constraint.advance(tokenizer.encode("x").ids[0])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (json_schema({"type": "nonsense"}), "nonsense"),
        (json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_schema({"$ref": "http://127.0.0.1/schema"}), "127.0.0.1"),
        (json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength"),
        (regex("(("), "unclosed group"),
        (regex("a(?=b)"), "look-around"),
        (lark("start: missing"), "missing"),
        (lark("x" * (LARGEST_GRAMMAR + 1)), "characters"),
        (json_schema({"type": "integer", "multipleOf": 10**9 + 7}), "takes more|fails"),
        (json_schema({"type": "number", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}), "takes more|fails"),
        (
            json_schema(
                {"properties": {str(n): {"type": "integer", "minimum": n, "maximum": 10**9 + n} for n in range(800)}}
            ),
            "too big",
        ),
        (json_schema({"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n}]} for n in range(24)]}), "too large"),
    ],
)
def test_a_grammar_that_is_wrong_or_too_large_is_refused_and_the_next_one_serves(constraints, grammar, message):
    with pytest.raises(RequestError, match=message):
        constraints.start(grammar)
    assert constraints.start(json_object()).allowed().any()


def test_nested_repetitions_end_in_an_error_while_tokens_are_chosen(constraints, tokenizer):
    constraint = constraints.start(regex("((((a{99}){99}){99}){99}){99}"))
    with pytest.raises(RequestError, match="too many expressions"):
        constraint.advance(tokenizer.encode("a").ids[0])


@pytest.mark.parametrize("schema", ["[1]", "{", [1], {"type": {1}}])
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(RequestError, match="JSON schema"):
        json_schema(schema)


def test_what_the_artifact_lacks_is_named(tokenizer):
    with pytest.raises(RequestError, match="no tokenizer"):
        Constraints(None, VOCABULARY, {END}).start(json_object())
    with pytest.raises(RequestError, match="end-of-sequence"):
        Constraints(tokenizer, VOCABULARY, set()).start(json_object())
