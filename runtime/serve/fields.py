"""A request's body, whose arguments are taken one by one: each is obeyed or refused by its name."""

import json
import math
from typing import Any, NoReturn

from runtime.serve.errors import ApiError

LONGEST_SHOWN = 60  # characters of a value or a name in a message
# Arguments of the API that this server does not have, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (),
    "verbosity": (),
    "web_search_options": (),
}


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises `ApiError`."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; expected an object")
    return body


class Fields:
    """The arguments of one request. What is null counts as not given. Every method raises `ApiError`."""

    def __init__(self, body: dict[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            refuse(name, value, "a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            refuse(name, value, "true or false")
        return value

    def integer(self, name: str, default: int | None, least: int, most: int | None = None) -> Any:
        value = self.take(name, default)
        if value is default:
            return value
        bounds = f"an integer, {least} or more" if most is None else f"an integer from {least} to {most}"
        if type(value) is not int or value < least or (most is not None and value > most):
            refuse(name, value, bounds)
        return value

    def number(self, name: str, default: float | None, least: float, most: float) -> Any:
        value = self.take(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not least <= value <= most:
            refuse(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of up to `most` of them, none of which is empty."""
        value = self.take(name, ())
        values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        if not isinstance(values, tuple) or len(values) > most or not all(isinstance(v, str) and v for v in values):
            refuse(name, value, f"a text, or a list of up to {most} texts, none of them empty")
        return values

    def biases(self, name: str) -> dict[int, float]:
        """An object of token ids, as texts, with a number from -100 to 100 each."""
        value, found = self.take(name, {}), {}
        if not isinstance(value, dict):
            refuse(name, value, "an object of token ids")
        for token, bias in value.items():
            if not token.isascii() or not token.isdigit() or len(token) > 9:
                refuse(name, token, "token ids as names")
            if type(bias) not in (int, float) or not math.fabs(bias) <= 100:
                refuse(name, bias, "numbers from -100 to 100")
            found[int(token)] = float(bias)
        return found

    def end(self) -> None:
        """Refuse every argument that nobody took, but for those that ask for nothing."""
        for name, value in self._left.items():
            if name not in UNSUPPORTED:
                plain = name if name.isprintable() and len(name) <= LONGEST_SHOWN else _shown(name)
                raise ApiError(400, f"{plain} is no argument of this request", plain, code="unknown_parameter")
            if value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name} is not supported by this server", name, code="unsupported_parameter")


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the error for an argument of a wrong value."""
    raise ApiError(400, f"{name} is {_shown(value)}; expected {expected}", name, code="invalid_value")


def _shown(value: Any) -> str:
    """A value of a body as JSON, in one line that any answer can hold: what is not printable is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
