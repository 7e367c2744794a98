"""What one server holds: the engine and its worker, the chat template, grammars and figures."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import anyio.to_thread

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.scheduler import Scheduler
from runtime.scheduling.request import Event, Request
from runtime.serve.calls import Call
from runtime.serve.errors import ApiError, busy, stopping
from runtime.serve.metrics import Metrics
from runtime.serve.options import ServeOptions
from runtime.serve.worker import Full, Job, Stopped, Worker
from runtime.text.tokenizer import decode, encode

T = TypeVar("T")
THREADS = 2  # that encode prompts, render templates and compile grammars beside the engine's


class Service:
    """One artifact, served. `stopping`: whether new requests are refused."""

    def __init__(self, engine: Engine, options: ServeOptions):
        self.engine, self.options, self.key = engine, options, options.read_key()
        self.name = options.name or engine.artifact.path.resolve().name
        self.classifies, self.stopping = bool(engine.labels), False
        self.scheduler: Scheduler | None = None
        if not self.classifies:
            self.scheduler = Scheduler(
                engine, options.slots, options.chunk, prefix_memory=options.cache << 20, exact=options.exact
            )
        self.slots = 1 if self.scheduler is None else self.scheduler.slots
        self.chats = engine.chat_template is not None
        self.metrics, self.started = Metrics(), time.time()
        self.worker = Worker(self.scheduler, self.slots + options.queue, self.metrics.step.observe)
        self._limit: anyio.CapacityLimiter | None = None
        self._watch()

    def start(self) -> None:
        """Start the engine's thread, in a running event loop."""
        self._limit = anyio.CapacityLimiter(THREADS)
        self.worker.start()

    async def stop(self) -> None:
        """Wait, up to `grace` seconds, until running requests have ended; then end the engine's thread."""
        self.drain()
        until = time.monotonic() + self.options.grace
        while self.worker.count and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await anyio.to_thread.run_sync(self.worker.join, 10.0)
        self.engine.close()

    def drain(self) -> None:
        """Refuse new requests."""
        self.stopping = True
        self.worker.close()

    async def apart(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function in a thread beside the event loop's. A `RequestError` becomes an `ApiError`."""
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self._limit)
        except RequestError as error:
            raise self.refused(error) from error

    def refused(self, error: RequestError) -> ApiError:
        """The error without the artifact's path, which is nothing for clients."""
        return ApiError(400, str(error).replace(str(self.engine.artifact.path), self.name))

    def check_task(self, classifies: bool) -> None:
        """Raise `ApiError` for what this kind of model does not do."""
        try:
            self.engine.check_task(classifies)
        except RequestError as error:
            raise self.refused(error) from error

    def check_model(self, model: str | None) -> None:
        """Raise `ApiError` for another model's name."""
        if model is not None and model != self.name:
            raise ApiError(404, f"model is {model!r}; this server has {self.name!r}", "model", code="model_not_found")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's ids. Raises `RequestError` where it does not fit."""
        ids = encode(self.engine.tokenizer, prompt, self.engine.artifact) if isinstance(prompt, str) else list(prompt)
        self.engine.check_prompt(ids)
        return ids

    def encode_chat(self, messages: Sequence[dict[str, Any]], variables: dict[str, Any] | None = None) -> list[int]:
        """The ids of a chat's prompt. Raises `RequestError`."""
        ids = self.engine.encode_chat(messages, variables)
        self.engine.check_prompt(ids)
        return ids

    def echoes(self, prompts: Sequence[str | list[int]]) -> list[str]:
        """The texts of prompts; of ids "" where there is no tokenizer. Raises `RequestError`."""
        tokenizer = self.engine.tokenizer
        return [
            prompt if isinstance(prompt, str) else "" if tokenizer is None else decode(tokenizer, prompt)
            for prompt in prompts
        ]

    def requests(self, call: Call, prompts: Sequence[list[int]], prompt_logprobs: bool = False) -> list[Request]:
        """A request for each choice of each prompt; with a seed, each has the next one. Raises `RequestError`."""
        made = []
        for ids in prompts:
            for _ in range(call.choices):
                request = self._request(call, ids, len(made), prompt_logprobs)
                request.check(self.engine.graph.vocabulary)
                made.append(request)
        return made

    def submit(
        self, requests: Sequence[Request], deliver: Callable[[int, Event], None], deadline: float | None
    ) -> list[Job]:
        """Begin sequences; `deliver` gets each one's events with its index, in the engine's thread.

        Raises `ApiError` where the queue is full or the server stops.
        """
        if len(requests) > self.worker.most:
            raise ApiError(400, f"the request has {len(requests)} sequences; expected up to {self.worker.most}", "n")
        until = time.monotonic() + min(deadline or float("inf"), self.options.deadline)
        jobs = [
            Job(request, lambda event, index=index: deliver(index, event), until)
            for index, request in enumerate(requests)
        ]
        try:
            self.worker.submit(jobs)
        except Full:
            raise busy(self.worker.count) from None
        except Stopped:
            raise stopping() from None
        return jobs

    async def call(self, function: Callable[[], T]) -> T:
        """Call the function in the engine's thread. Raises `ApiError`."""
        try:
            return await asyncio.wrap_future(self.worker.call(function))
        except Full:
            raise busy(self.worker.count) from None
        except Stopped:
            raise stopping() from None
        except RequestError as error:
            raise self.refused(error) from error

    def state(self) -> dict[str, Any]:
        """What the page shows while it runs."""
        scheduler = self.scheduler
        counters = {} if scheduler is None else vars(scheduler.counters)
        return {
            "model": self.name,
            "slots": self.slots,
            "slots_in_use": 0 if scheduler is None else scheduler.running,
            "waiting": 0 if scheduler is None else max(0, self.worker.count - scheduler.running),
            "stopping": self.stopping,
            "seconds": time.time() - self.started,
            **counters,
        }

    def _request(self, call: Call, ids: list[int], index: int, prompt_logprobs: bool) -> Request:
        most, sampling = self.engine.graph.max_length, call.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        return Request(
            ids,
            most if call.max_tokens is None else call.max_tokens,
            sampling,
            stop=call.stop,
            logit_bias=call.logit_bias,
            logprobs=call.logprobs,
            prompt_logprobs=1 if prompt_logprobs else None,
            constraint=None if call.grammar is None else self.engine.constraints.start(call.grammar),
        )

    def _watch(self) -> None:
        watch, scheduler = self.metrics.watch, self.scheduler
        watch("wm_slots", "Slots of the engine.", lambda: self.slots)
        watch("wm_pending_sequences", "Sequences under way or waiting.", lambda: self.worker.count)
        if scheduler is not None:
            counters = scheduler.counters
            watch("wm_proposed_tokens", "Tokens that were guessed ahead.", lambda: counters.proposed)
            watch("wm_accepted_tokens", "Guessed tokens that were right.", lambda: counters.accepted)
            watch("wm_slots_in_use", "Slots that hold a sequence.", lambda: scheduler.running)
            watch("wm_queue", "Sequences without a slot.", lambda: max(0, self.worker.count - scheduler.running))
