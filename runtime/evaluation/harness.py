"""An artifact as a model of lm-evaluation-harness (the package lm-eval): its tasks measure the deployed engine.

Requests go through the scheduler, as many at a time as it has slots. A context is computed in chunks, and the whole
chunks with which several contexts begin are computed once. Logprobs of given text need the logits of every token, which
come a chunk at a time, or token by token from an artifact that gives the logits of one token a step.
"""

from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm import tqdm

from runtime.engine import Engine
from runtime.errors import RequestError
from runtime.evaluation.windows import context_length, prefix_id
from runtime.scheduler import Event, Request, Scheduler
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import check_tokenizer

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # what a task that samples may leave out
Pair = tuple[Any, list[int], list[int]]  # the texts, then the ids of a context and of its continuation


class EngineLM(TemplateLM):
    """A loaded engine behind lm-eval's interface. `slots`: sequences at a time, by default all of the artifact's.

    Raises `RequestError` for a classifier, an artifact without a tokenizer, and one without an end-of-sequence id.
    """

    def __init__(self, engine: Engine, slots: int | None = None):
        super().__init__()
        self._prefix = prefix_id(engine)
        self.engine, self.ids_of = engine, check_tokenizer(engine.tokenizer, engine.artifact)
        self.scheduler = Scheduler(engine, slots)

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.end_ids)

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return context_length(self.engine)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. By default special tokens are added as the tokenizer does, once."""
        tokenizer: Tokenizer = self.ids_of
        if add_special_tokens is None:
            begun = tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (begun and string.startswith(begun))
        return tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation its logprob after its context, and whether greedy decoding would write it."""
        asked = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation has {len(continuation)} tokens; this artifact scores up to "
                    f"{self.max_length}, so export it with a larger --max-length"
                )
            ids = (context + continuation)[-self.max_length - 1 :]
            start = max(1, len(ids) - len(continuation))
            asked.append(Request(ids, 0, logprobs=1, prompt_logprobs=start, text=False))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, event in self._answers(asked, "loglikelihood", disable_tqdm):
            assert event.prompt_logprobs is not None
            scored = [each for each in event.prompt_logprobs[-len(requests[index][2]) :] if each is not None]
            greedy = all(each.top[0][0] == each.token for each in scored)
            found[index] = sum(each.logprob for each in scored), greedy
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The logprob of each whole text, in windows that do not overlap."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _greedy) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text to follow each prompt, up to the first of its stop strings."""
        end = self.ids_of.decode([self.eot_token_id], skip_special_tokens=False)
        asked = []
        for request in requests:
            arguments: Any = request.args
            prompt, options = arguments
            values: dict[str, Any] = {**normalize_gen_kwargs(options, 256)}
            stops = tuple(stop for stop in handle_stop_sequences(values.pop("until", None), eos=end) if stop)
            most = values.pop("max_gen_toks")
            samples = values.pop("do_sample", False)
            temperature, top_k, top_p = (values.pop(name, default) for name, default in SAMPLING.items())
            sampling = Sampling(temperature if samples else 0.0, top_k, top_p, seed=values.pop("seed", 0))
            if values:
                raise RequestError(f"a task asks for the generation option {min(values)}; this engine has none such")
            room = self.engine.graph.max_length - most
            if room < 1:
                raise RequestError(f"a task asks for {most} new tokens; a slot holds {self.engine.graph.max_length}")
            asked.append(Request(self.tok_encode(prompt)[-room:], most, sampling, stops))
        found = [""] * len(asked)
        for index, event in self._answers(asked, "generate_until", disable_tqdm):
            found[index] += event.text
        return found

    def _answers(self, requests: list[Request], name: str, disable_tqdm: bool) -> Iterator[tuple[int, Event]]:
        """Each request's number with its events, as they come. The longest prompts begin first."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
        numbers = {self.scheduler.begin(requests[index]): index for index in order}
        with tqdm(total=len(requests), desc=name, disable=disable_tqdm) as bar:
            for event in self.scheduler.run():
                if event.error is not None:
                    raise RequestError(event.error)
                bar.update(event.finish_reason is not None)
                yield numbers[event.sequence], event
