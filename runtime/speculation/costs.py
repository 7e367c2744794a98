"""What a step costs by the number of tokens that it reads: timed on the session that runs it, when speculation begins.

It depends on the model, the kernels and the processor: in steps of one token, one of nine costs 1.8 in float32 and 3.1
in int4 with doge-3m on a CPU with AVX-512.

B slots of a step, S new tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.slots import Slots

SIZES = (1, 2, 3, 5, 9, 16)  # S of the steps that are timed
BETWEEN = 2  # steps of one token before each that is timed, whose kernels are then as cold as those of a rare check
LEAST, MOST, SECONDS = 3, 20, 0.5  # rounds of all sizes: at least, at most, and what they take between


@dataclass(frozen=True)
class Costs:
    """The time of steps, in steps of one token.

    `steps`: what a step of 1, 2, 3 … tokens costs; the first is 1. `first_guess`: what the first guess of a step costs,
    for all sequences, when the target's weights have replaced the draft's in the processor's caches; `guess`: what each
    further one costs.
    """

    steps: tuple[float, ...]
    first_guess: float = 0.0
    guess: float = 0.0

    def of(self, slots: int, guesses: int) -> float:
        """The cost of a step of B = `slots` that checks so many guesses of each, and of making them."""
        tokens, most = slots * (guesses + 1), len(self.steps)
        if tokens <= most:
            step = self.steps[tokens - 1]
        else:  # as each further token costs on average
            step = self.steps[-1] + (tokens - most) * (self.steps[-1] - 1.0) / max(1, most - 1)
        return step + (self.first_guess + (guesses - 1) * self.guess if guesses else 0.0)


def measure(target: Slots, draft: Slots | None = None) -> Costs:
    """Time steps of one slot of the target, and steps of the draft, which make guesses. Empties their slots."""
    most = min(target.session.chunk, target.session.most_rows)
    sizes = tuple(size for size in SIZES if size <= most)
    target.reserve(1, max(sizes))
    with target.in_use:
        seconds = _shortest(lambda: _sized(target, sizes))
        first = further = 0.0
        if draft is not None:
            draft.reserve(1, 1)
            with draft.in_use:
                first, further = (_shortest(lambda: _guesses(target, draft)) / seconds[0]).tolist()
            draft.reset()
    target.reset()
    steps = np.interp(np.arange(1, sizes[-1] + 1), sizes, np.maximum.accumulate(seconds) / seconds[0])
    return Costs(tuple(steps.tolist()), first, further)


def _shortest(run: Callable[[], list[float]]) -> np.ndarray:
    """The shortest of each time that rounds give, since what else the machine does only adds to it."""
    run()  # the first step of a size allocates
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() - began < SECONDS):
        rounds.append(run())
    return np.min(rounds, axis=0)


def _sized(slots: Slots, sizes: tuple[int, ...]) -> list[float]:
    """The seconds of a step of each size, after steps of one token."""
    found = []
    for size in sizes:
        for _ in range(BETWEEN):
            _time(slots, 1)
        found.append(_time(slots, size))
    return found


def _guesses(target: Slots, draft: Slots) -> list[float]:
    """The seconds of the draft's first step after one of the target, and of its second."""
    _time(target, 1)
    return [_time(draft, 1) for _ in range(2)]


def _time(slots: Slots, size: int) -> float:
    """The seconds of a step of one slot over so many tokens."""
    ids, held, new = np.zeros((1, size), np.int64), np.zeros(1, np.int64), np.array([size])
    began = time.perf_counter()
    if size > 1:
        slots.session.step_rows(ids, held, new, size, True)
    else:
        slots.session.step(ids, held, new, True)
    return time.perf_counter() - began
