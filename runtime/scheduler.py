"""Many sequences through the slots of one engine: they join and leave between steps.

B slots, n slots of a step, S new tokens, R rows of logits, V vocabulary.

What a request gets does not depend on its company: it is, to the bit, what it gets alone on the same scheduler, in
float32 and int8 on the CPU. Three things see to that.

- A prompt is cut into pieces of `chunk` tokens from its beginning, and each piece runs alone in its slot.
- A decode step runs the first n slots, where n is a multiple of `Session.row_multiple`. ONNX Runtime's kernels for
  batches of this size gave each row the same bits at every n and every position: tried with 1 to 8 rows of float32,
  float16, bfloat16, int8 and int4 models. At other sizes the last rows differ (int8 by up to 0.2 in a logit).
- Rows of earlier prompts are taken over in whole pieces only (`runtime.scheduling.prefixes`).

Where the engine speculates, a step's length follows the guesses, and it gets that up to what kernels round.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from runtime.errors import RequestError
from runtime.ids import as_integer
from runtime.scheduling.prefixes import PrefixCache
from runtime.scheduling.request import Constraint, Event, FinishReason, Logprob, Request
from runtime.scheduling.sequence import Sequence
from runtime.speculation.options import is_recurrent

if TYPE_CHECKING:  # which is made of schedulers itself
    from runtime.engine import Engine

__all__ = ["Constraint", "Counters", "Event", "FinishReason", "Logprob", "Request", "Scheduler"]

SINGLE = 16  # a step of one token counts as this many tokens of a piece


@dataclass
class Counters:
    """What a scheduler has done since it was made.

    `prompt_tokens`: tokens of prompts that were begun, of which `reused_tokens` were not computed; `cache_hits`:
    requests with such tokens. `new_tokens`: tokens of events. `steps`: decode steps; `rows`: slots computed in them.
    `unshared_pieces`: pieces that could not be kept for reuse, since some of their rows had been evicted. `proposed`:
    tokens that were guessed, of which `accepted` were right.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    cache_hits: int = 0
    reused_tokens: int = 0
    steps: int = 0
    rows: int = 0
    unshared_pieces: int = 0
    proposed: int = 0
    accepted: int = 0


class Step(NamedTuple):
    """What a decode step does for one sequence: it reads its unread ids and the `guesses` behind them.

    `states`: those without rows before the step, where wrong guesses are to be taken out of them.
    """

    sequence: Sequence
    guesses: list[int]
    states: list[np.ndarray] | None


class Scheduler:
    """Serves requests with an engine's slots. One thread uses it, and nothing else uses the engine meanwhile.

    `slots`: sequences under way at once, by default all that the artifact serves. `chunk`: the most prompt tokens that
    are computed between two decode steps. `prefix_memory`: bytes for cache rows of earlier prompts, 0 for no reuse.
    `exact=False` computes no slots but those in use: a lone request is then faster, and what a request gets can differ
    from its solo run by what kernels round. Guesses ahead as the engine was told by `Engine.speculate`.
    """

    def __init__(
        self, engine: "Engine", slots: int | None = None, chunk: int = 128, *, prefix_memory: int = 256 << 20,
        exact: bool = True,
    ):  # fmt: skip
        engine.check_task(classifies=False)
        most = engine.graph.max_batch
        self.engine, self.counters = engine, Counters()
        self.slots = most if slots is None else as_integer(slots, "slots", 1, most)
        self.chunk = min(as_integer(chunk, "chunk", 1), engine.session.chunk)
        self._multiple = engine.session.row_multiple if exact and self.slots > 1 else 1
        self._prefixes = PrefixCache(self.chunk, prefix_memory)
        self._held: object = None
        self._lengths = np.zeros(0, np.int64)  # tokens of each slot, as the engine has them
        self._numbers = 0
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()  # in slots; the first has the next turn
        self._running: list[Sequence] = []  # in slots; their last id is not in the caches yet
        self._ended: list[Event] = []  # cancelled since the last step
        self._unclean: set[int] = set()  # slots that may hold what is not finite
        self._shorter = False  # whether a sequence has ended since the capacity was last chosen
        self._recurrent = is_recurrent(engine.artifact)
        self._speculator = None if engine.speculation is None else engine.speculation.start(self.slots)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._prefilling) + len(self._running)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._sequences or self._ended)

    def begin(self, request: Request) -> int:
        """Queue a request; returns the number by which events name it. Raises `RequestError` if it cannot be met."""
        request.check(self.engine.graph.vocabulary)
        ids = self.engine.check_prompt(request.ids).tolist()
        if request.stop and self.engine.tokenizer is None:
            raise RequestError(f"{self.engine.artifact.path}: has no tokenizer, which stop strings need; use stop_ids")
        room = min(request.max_new_tokens, self.engine.graph.max_length - len(ids) + 1)
        sequence = Sequence(self._numbers, replace(request, ids=ids), room, self.engine.end_ids, self.engine.tokenizer)
        self._numbers += 1
        self._sequences[sequence.number] = sequence
        self._waiting.append(sequence)
        return sequence.number

    def cancel(self, sequence: int) -> None:
        """End a sequence; the next step reports it. Nothing happens where it has ended already."""
        found = self._sequences.get(sequence)
        if found is not None:
            self._ended.append(self._end(found, "cancelled"))

    def step(self) -> list[Event]:
        """Compute up to `chunk` tokens of prompts and one token of each running sequence; returns what it brought.

        Where none runs yet, first tokens are returned before second ones are computed. A piece of a prompt is computed
        whole or not at all; those that have a slot take turns. Raises `RequestError` where another call has used the
        engine's slots.
        """
        events, self._ended = self._ended, []
        with self.engine.in_use:
            if self._held is not None and self.running:
                self.engine.check_held(self._held)
            self._admit()
            self._shrink()
            decodes = bool(self._running)
            events += self._prefill()
            return events + self._decode() if decodes else events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do, event by event."""
        while not self.idle:
            yield from self.step()

    def _admit(self) -> None:
        """Give the free slots to waiting requests."""
        if not self._waiting:
            return
        if not self.running and self.engine.held is not self._held:
            self._reserve()
        free = sorted(set(range(self.slots)) - {each.slot for each in (*self._prefilling, *self._running)})
        while self._waiting and free:
            sequence = self._waiting.popleft()
            # a long prompt is out of the way of those that step; a short one soon fills the gap between them
            sequence.slot = slot = free.pop(-1 if len(sequence.ids) > self.chunk else 0)
            if slot in self._unclean or self._recurrent:
                self.engine.session.clear_slot(slot)
                self._unclean.discard(slot)
            self.counters.prompt_tokens += sequence.prompt_tokens
            self._prefilling.append(sequence)

    def _reserve(self) -> None:
        """Empty slots, with memory for what waits; they need more later only where a longer request comes."""
        longest = max(each.prompt_tokens + max(each.room, 1) - 1 for each in self._waiting)
        batch = -(-self.slots // self._multiple) * self._multiple
        self.engine.reserve(batch, longest)
        self._held = self.engine.held
        self._lengths = cast(np.ndarray, self._held)  # written in place, so it stays the one that is held
        self._unclean = set()

    def _prefill(self) -> list[Event]:
        """Pieces of prompts, in turns, until `chunk` tokens are computed or the next piece would go beyond them."""
        events, left = [], self.chunk
        while self._prefilling:
            sequence = self._prefilling[0]
            try:
                if not self._lengths[sequence.slot]:
                    self._take_prefix(sequence)
                size = self._piece(sequence)
                cost = SINGLE if size == 1 else size
                if cost > left and left < self.chunk:
                    break
                left -= cost
                self._prefilling.rotate(-1)
                self._advance(sequence, size, events)
            except ValueError as error:  # this library's own errors, and those of a constraint
                events.append(self._end(sequence, "error", str(error)))
        return events

    def _piece(self, sequence: Sequence) -> int:
        """How many tokens of the prompt are computed next."""
        done = int(self._lengths[sequence.slot])
        most, left = self.engine.session.most_rows, sequence.prompt_tokens - done
        if sequence.prompt_logprobs is None or most >= self.chunk:
            return min(self.chunk, left)
        # the logits of each further token are wanted, and a step gives those of its last ones
        return max(min(most, left), min(self.chunk, sequence.unscored - done))

    def _take_prefix(self, sequence: Sequence) -> None:
        """Begin with cache rows that are kept of earlier prompts."""
        blocks = self._prefixes.find(sequence.ids[: sequence.unscored + 1]) if sequence.request.reuse else []
        self._make_room(len(blocks) * self.chunk)
        for index, rows in enumerate(blocks):
            self.engine.session.write_rows(sequence.slot, index * self.chunk, rows)
        sequence.reused = self._lengths[sequence.slot] = len(blocks) * self.chunk
        self.counters.cache_hits += bool(blocks)
        self.counters.reused_tokens += sequence.reused

    def _advance(self, sequence: Sequence, size: int, events: list[Event]) -> None:
        """Compute a piece of a prompt; after the last one the sequence has its first token and runs."""
        slot, session = sequence.slot, self.engine.session
        done = int(self._lengths[slot])
        self._make_room(done + size)
        end = done + size
        # logits that nobody reads stay where they are
        scores = sequence.prompt_logprobs is not None and end > sequence.unscored
        plain = not scores and (sequence.plain or end < sequence.prompt_tokens)
        wanted = {"rows": end - max(done, sequence.unscored)} if scores else {}
        rows = session.step_slot(slot, np.array(sequence.ids[done:end]), self._lengths, plain, **wanted)
        self._lengths[slot] = end
        if scores:
            sequence.note_prompt(rows, end)
        if sequence.request.reuse and (key := self._prefixes.wants(sequence.ids[:end])):
            kept = session.read_rows(slot, done, end)
            self.counters.unshared_pieces += kept is None
            if kept is not None:
                self._prefixes.keep(key, kept)
        if end < sequence.prompt_tokens:
            return
        self._prefilling.remove(sequence)
        self._running.append(sequence)
        if not sequence.room:
            event = sequence.end("length")
        else:
            event = sequence.take(int(rows[0])) if plain else sequence.choose(rows[-1])
        events.append(self._note(sequence, event))

    def _decode(self) -> list[Event]:
        """The next token of each running sequence, and those behind it that were guessed right."""
        stepping = list(self._running)
        self._move_together()
        count = max(each.slot for each in stepping) + 1
        count = -(-count // self._multiple) * self._multiple
        plain = all(each.plain for each in stepping)
        try:
            steps = self._plan(stepping, count)
            found = self._run(steps, count, plain)
        except ValueError as error:
            return [self._end(each, "error", str(error)) for each in stepping]
        self.counters.steps += 1
        self.counters.rows += count
        events: list[Event] = []
        for each in steps:
            try:
                self._choose(each, found[each.sequence.slot], plain, events)
            except ValueError as error:
                events.append(self._end(each.sequence, "error", str(error)))
        return events

    def _plan(self, stepping: list[Sequence], count: int) -> list[Step]:
        """What each sequence reads in the next step, over the first `count` slots: its unread ids, and guesses."""
        lengths = self._lengths[:count].tolist()
        room = self.engine.graph.max_length - max(lengths)
        unread = [len(each.ids) - lengths[each.slot] for each in stepping]
        if max(unread) > room:  # a slot beside has no room for as many: all but the last are read alone
            for sequence, size in zip(stepping, unread, strict=True):
                self._read_alone(sequence, size - 1)
        guesses: list[list[int]] = [[] for _ in stepping]
        if self._speculator is not None and max(unread) == 1:
            guesses = self._speculator.guess(stepping, count, room - 1)
        states = self._recurrent and any(guesses)
        return [
            Step(sequence, guessed, self._states(sequence) if states else None)
            for sequence, guessed in zip(stepping, guesses, strict=True)
        ]

    def _run(self, steps: list[Step], count: int, plain: bool) -> np.ndarray:
        """Compute the first `count` slots: logits (n, R, V) or, if `plain`, ids (n, R), right-aligned."""
        lengths = self._lengths[:count].tolist()
        new = [[*each.sequence.ids[lengths[each.sequence.slot] :], *each.guesses] for each in steps]
        length, rows = max(map(len, new)), 1 + max(len(each.guesses) for each in steps)
        ids, sizes = np.zeros((count, length), np.int64), np.zeros(count, np.int64)
        for each, read in zip(steps, new, strict=True):
            ids[each.sequence.slot, : len(read)], sizes[each.sequence.slot] = read, len(read)
        self._make_room(max(lengths) + length)  # idle slots write rows too, behind their own
        session = self.engine.session
        if rows == 1:
            found = session.step(ids, self._lengths, sizes, plain)[:, None]
        else:
            found = session.step_rows(ids, self._lengths, sizes, rows, plain)
        self._lengths[:count] += sizes
        return found

    def _choose(self, step: Step, found: np.ndarray, plain: bool, events: list[Event]) -> None:
        """Choose a sequence's tokens as long as they are what was guessed, and one more; forget the other guesses.

        found: logits (R, V), or, if `plain`, ids (R,), of which the last are this sequence's.
        """
        sequence, guesses = step.sequence, step.guesses
        before, right, ended = len(sequence.ids), 0, False
        for index, logits in enumerate(found[len(found) - len(guesses) - 1 :]):
            event = self._note(sequence, sequence.take(int(logits)) if plain else sequence.choose(logits))
            events.append(event)
            ended = event.finish_reason is not None
            right += index < len(guesses) and event.token == guesses[index]
            if ended or right == index:
                break
        if not guesses:
            return
        self.counters.proposed += len(guesses)
        self.counters.accepted += right
        if not ended:
            assert self._speculator is not None
            self._speculator.note(sequence, len(guesses), right)
            self._lengths[sequence.slot] = before + right
            if step.states is not None and right < len(guesses):  # they have seen wrong guesses: read the right again
                self.engine.session.write_rows(sequence.slot, before - 1, step.states)
                self._lengths[sequence.slot] = before - 1

    def _states(self, sequence: Sequence) -> list[np.ndarray] | None:
        """The states of a sequence's slot that have no rows, as they are."""
        length = int(self._lengths[sequence.slot])
        return self.engine.session.read_rows(sequence.slot, length, length)

    def _read_alone(self, sequence: Sequence, size: int) -> None:
        """Read the sequence's next `size` ids while the other slots sit it out."""
        length = int(self._lengths[sequence.slot])
        if size:
            ids = np.array(sequence.ids[length : length + size])
            self.engine.session.step_slot(sequence.slot, ids, self._lengths, True)
            self._lengths[sequence.slot] += size

    def _move_together(self) -> None:
        """Move running sequences from behind into free slots before them, so that a step computes few idle slots."""
        if max(each.slot for each in self._running) < len(self._running):
            return  # none is free before them
        taken = {each.slot for each in (*self._prefilling, *self._running)}
        for sequence in sorted(self._running, key=lambda each: -each.slot):
            slot = next((slot for slot in range(len(self._running)) if slot not in taken), None)
            if slot is None or slot > sequence.slot:
                return
            self.engine.session.copy_slot(sequence.slot, slot, int(self._lengths[sequence.slot]))
            self._lengths[slot], self._lengths[sequence.slot] = self._lengths[sequence.slot], 0
            taken = taken - {sequence.slot} | {slot}
            sequence.slot = slot

    def _make_room(self, tokens: int) -> None:
        """Have a capacity for slots of so many tokens."""
        if tokens > self.engine.session.capacity:
            self.engine.session.grow(self.engine.bucket(tokens))

    def _shrink(self) -> None:
        """Once a long sequence has ended, steps need not read as many cache rows as it had."""
        if not self._shorter:
            return
        self._shorter = False
        held = [len(each.ids) for each in (*self._prefilling, *self._running)]
        if held:
            capacity = self.engine.bucket(max(held) + self.chunk)
            if 2 * capacity <= self.engine.session.capacity:
                self.engine.session.shrink(capacity)

    def _note(self, sequence: Sequence, event: Event) -> Event:
        """Count an event's token, and take the sequence away where it is the last."""
        self.counters.new_tokens += event.token is not None
        if event.finish_reason is not None:
            self._forget(sequence)
        return event

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Event:
        if error is not None and sequence.slot >= 0:
            self._unclean.add(sequence.slot)
        self._forget(sequence)
        return sequence.end(reason, error)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.number]
        if self._speculator is not None:
            self._speculator.forget(sequence.number)
        for held in (self._waiting, self._prefilling, self._running):
            if sequence in held:
                held.remove(sequence)
        if sequence.slot >= 0:
            self._lengths[sequence.slot] = 0
            self._shorter = True
