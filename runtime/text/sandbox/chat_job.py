"""Render a chat template: the checkpoint's, which is code that a stranger wrote. Runs in the child process alone.

The environment is the one that transformers renders chat templates in: the same settings, extensions, filters and
global functions.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace


class GenerationBlock(Extension):
    """`{% generation %}`, with which templates mark what the assistant wrote: its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class TemplateDict:
    """`dict` without the attributes that lead out of the sandbox."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `namespace(self=…)` is allowed
        self, *pairs = arguments
        values = dict(*pairs, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the template stores {name!r} in a namespace; names may not begin with an underscore")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(8)
def compile_template(template: str) -> jinja2.Template:
    """The compiled template. Raises jinja2's errors."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=_now, dict=TemplateDict(), namespace=TemplateNamespace
    )
    return environment.from_string(template)


def answer(template: str, variables: dict[str, Any], limit: int) -> str:
    """The template's text, of up to `limit` characters. Raises whatever the template raises."""
    parts, size = [], 0
    for part in compile_template(template).generate(**variables):
        size += len(part)
        if size > limit:
            raise jinja2.TemplateError(f"the template writes more than {limit} characters")
        parts.append(part)
    return "".join(parts)
