"""What a caller asks of the scheduler, and what it is told: requests and events.

V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from runtime.backends.arrays import log_softmax
from runtime.errors import RequestError
from runtime.ids import as_integer
from runtime.text.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """Decides which tokens may come next: a grammar, a schema, a list of choices. One object serves one sequence."""

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next: a bool mask (V,), or None for all. An end id that is allowed ends the text."""
        ...

    def advance(self, token: int) -> None:
        """Take note of the token that was chosen; end ids are not reported."""
        ...


class Logprob(NamedTuple):
    """The natural logarithm of a token's probability by the model's logits alone, before any sampling option.

    `top` has the most probable tokens and theirs, the most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    `ids`: the prompt. `max_new_tokens`: 0 asks for the prompt's logprobs alone. `stop`: strings before the first of
    which the text ends. `stop_ids`: tokens that end it beside the artifact's own. `logit_bias`: added to the logits of
    these ids. `logprobs`: with each token its logprob and those of this many most probable tokens. `prompt_logprobs`:
    the same for the prompt's tokens from this index on, at least 1, for the first has none. `constraint`: an object of
    its own for each request. `reuse`: whether the prompt may begin with cache rows of earlier prompts. `text`: whether
    events have text; ids alone are cheaper.
    """

    ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    reuse: bool = True
    text: bool = True

    def check(self, vocabulary: int) -> None:
        """Raise `RequestError` for values that no engine can serve; the prompt's ids are checked by the engine."""
        as_integer(self.max_new_tokens, "max_new_tokens", 0)
        for token in self.stop_ids:
            as_integer(token, "a stop id", 0)
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty; expected at least one character")
        if self.logprobs is not None:
            as_integer(self.logprobs, "logprobs", 0, vocabulary)
        if self.prompt_logprobs is not None:
            as_integer(self.prompt_logprobs, "prompt_logprobs", 1, max(1, len(self.ids)))
        for token, bias in self.logit_bias.items():
            as_integer(token, "a token id of logit_bias", 0, vocabulary - 1)
            if not np.isfinite(bias):
                raise RequestError(f"logit_bias of token id {token} is {bias}; expected a finite number")


@dataclass(frozen=True, slots=True)
class Event:
    """What one step brought a sequence: a token, the end, or both.

    `sequence`: the number that `begin` returned. `token`: None at an end without one (an end id, a cancellation, an
    error). `text`: whole characters that are certain now, which may be those of earlier tokens too. `logprob` and
    `top_logprobs` where the request asks for them. `prompt_logprobs`, in the first event alone: an entry a prompt
    token, None for those before the first that was asked for. `ended_by`: the id that ended the sequence, which is no
    token of the answer, with its logprob, where the request asks for logprobs. `finish_reason`: set in the last event,
    once; `error` says why where it is "error". `prompt_tokens`, `new_tokens`, `reused_tokens`: usage so far; new tokens
    are those of events, reused ones the prompt tokens that were not computed again.
    """

    sequence: int
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    ended_by: Logprob | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0


def logprob_of(logits: np.ndarray, token: int, count: int) -> Logprob:
    """The logprob of `token` by logits (V,), and those of the `count` most probable tokens, the lower id of equals."""
    scores = log_softmax(logits)
    best: list[int] = []
    if count:
        near = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
        best = near[np.argsort(-scores[near], kind="stable")][:count].tolist()
    return Logprob(token, float(scores[token]), tuple((each, float(scores[each])) for each in best))
