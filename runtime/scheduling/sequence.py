"""One sequence on its way: its ids, how its next token is chosen, its text, and when it ends.

V vocabulary.
"""

from collections.abc import Set
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from runtime.errors import RequestError
from runtime.scheduling.request import Event, FinishReason, Logprob, Request, logprob_of
from runtime.text.sampling import Sampler
from runtime.text.tokenizer import StopStrings, TextStream


class Sequence:
    """What the scheduler knows of a request that it has taken.

    `ids`: the prompt and what was chosen since. `slot`: where its cache rows are, -1 while it waits. `room`: the most
    new tokens. `plain`: whether the id of the largest logit is all that a step must bring.
    """

    def __init__(self, number: int, request: Request, room: int, end_ids: Set[int], tokenizer: Tokenizer | None):
        self.number, self.request, self.room = number, request, room
        self.ids = list(request.ids)
        self.slot = -1
        self.reused = self.new = 0
        start = request.prompt_logprobs
        self.prompt_logprobs: list[Logprob | None] | None = None if start is None else [None for _ in range(start)]
        self.sampler = Sampler(request.sampling)
        self.plain = (
            request.sampling.greedy
            and request.logprobs is None
            and not request.logit_bias
            and request.constraint is None
        )
        self._ends = {*end_ids, *request.stop_ids}
        self._stream = TextStream(tokenizer) if tokenizer is not None and (request.text or request.stop) else None
        self._stops = StopStrings(request.stop)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def unscored(self) -> int:
        """The prompt's first tokens, of which no step has to bring logits."""
        start = self.request.prompt_logprobs
        return self.prompt_tokens - 1 if start is None else start - 1

    def note_prompt(self, rows: np.ndarray, end: int) -> None:
        """Of logits (S, V) that end with those of the prompt's token `end` - 1, take the next tokens' logprobs."""
        assert self.prompt_logprobs is not None
        for position, logits in enumerate(rows, end - len(rows) + 1):
            if self.unscored < position < self.prompt_tokens:
                known = logprob_of(logits, self.ids[position], self.request.logprobs or 0)
                self.prompt_logprobs.append(known)

    def choose(self, logits: np.ndarray) -> Event:
        """Choose the next token from logits (V,), float32, which are only read."""
        if not np.isfinite(logits).all():
            raise RequestError(self._overflow())
        request, scores = self.request, logits
        if request.logit_bias:
            scores = scores.astype(np.float64)
            scores[list(request.logit_bias)] += list(request.logit_bias.values())
        allowed = None if request.constraint is None else request.constraint.allowed()
        if allowed is not None:
            if not allowed.any():
                raise RequestError("the constraint allows no token; check the grammar or schema")
            scores = np.where(allowed, scores, -np.inf)
        token = int(self.sampler(scores[None], [self.ids])[0])
        known = None if request.logprobs is None else logprob_of(logits, token, request.logprobs)
        return self.take(token, known)

    def take(self, token: int, known: Logprob | None = None) -> Event:
        """Go on with `token`, -1 where there is none since logits were not finite."""
        if token < 0:
            raise RequestError(self._overflow())
        if token in self._ends:
            return replace(self.end("stop"), ended_by=known)
        if self.request.constraint is not None:
            self.request.constraint.advance(token)
        self.ids.append(token)
        self.new += 1
        text = self._stops.push(self._stream.push(token)) if self._stream is not None else ""
        if self._stops.found:
            return self._event(token, text, known, "stop")
        if self.new == self.room:
            text += self._rest()  # in which there may be a stop
            return self._event(token, text, known, "stop" if self._stops.found else "length")
        return self._event(token, text, known)

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """The end without another token; what was held back of the text comes with it where it is complete."""
        return self._event(None, self._rest() if reason in ("stop", "length") else "", None, reason, error)

    def _rest(self) -> str:
        if self._stream is None or self._stops.found:
            return ""
        return self._stops.push(self._stream.finish()) + self._stops.finish()

    def _event(
        self, token: int | None, text: str, known: Logprob | None, reason: FinishReason | None = None,
        error: str | None = None,
    ) -> Event:  # fmt: skip
        prompt, self.prompt_logprobs = self.prompt_logprobs, None
        return Event(
            self.number,
            token,
            text if self.request.text else "",
            None if known is None else known.logprob,
            () if known is None else known.top,
            None if prompt is None else tuple(prompt),
            None,
            reason,
            error,
            self.prompt_tokens,
            self.new,
            self.reused,
        )

    def _overflow(self) -> str:
        return (
            f"the logits of slot {self.slot} after token {len(self.ids)} are not finite; the weights or dtype overflow"
        )
