"""What a step costs by the number of tokens that it reads: timed on the session that runs it, when speculation begins.

It depends on the model, the kernels and the processor: in steps of one token, one of nine costs 1.8 in float32 and 3.1
in int4 with doge-3m on a CPU with AVX-512.

B slots of a step, S new tokens.
"""

import time
from dataclasses import dataclass

import numpy as np

from runtime.slots import Slots

SIZES = (1, 2, 3, 5, 9, 16)  # S of the steps that are timed
BETWEEN = 2  # steps of one token before each that is timed, whose kernels are then as cold as those of a rare check
LEAST, MOST, SECONDS = 3, 20, 0.5  # rounds of all sizes: at least, at most, and what they take between


@dataclass(frozen=True)
class Costs:
    """The time of steps, in steps of one token.

    `steps`: what a step of 1, 2, 3 … tokens costs; the first is 1. `guess`: what one guess costs, for all sequences.
    """

    steps: tuple[float, ...]
    guess: float = 0.0

    def of(self, slots: int, guesses: int) -> float:
        """The cost of a step of B = `slots` that checks so many guesses of each, and of making them."""
        tokens, most = slots * (guesses + 1), len(self.steps)
        if tokens <= most:
            step = self.steps[tokens - 1]
        else:  # as each further token costs on average
            step = self.steps[-1] + (tokens - most) * (self.steps[-1] - 1.0) / max(1, most - 1)
        return step + guesses * self.guess


def measure(target: Slots, draft: Slots | None = None) -> Costs:
    """Time steps of one slot of the target, and one step of the draft, which makes a guess. Empties their slots."""
    most = min(target.session.chunk, target.session.most_rows)
    sizes = tuple(size for size in SIZES if size <= most)
    seconds = _seconds(target, sizes)
    guess = 0.0 if draft is None else float(_seconds(draft, (1,))[0] / seconds[0])
    steps = np.interp(np.arange(1, sizes[-1] + 1), sizes, np.maximum.accumulate(seconds) / seconds[0])
    return Costs(tuple(steps.tolist()), guess)


def _seconds(slots: Slots, sizes: tuple[int, ...]) -> np.ndarray:
    """The shortest time of a step of each size, since what else the machine does only adds to it."""
    slots.reserve(1, max(sizes))
    rounds: list[list[float]] = []
    began = time.perf_counter()
    with slots.in_use:
        for size in sizes:  # the first of a size allocates
            _time(slots, size)
        while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() - began < SECONDS):
            rounds.append([])
            for size in sizes:
                for _ in range(BETWEEN):
                    _time(slots, 1)
                rounds[-1].append(_time(slots, size))
    slots.reset()
    return np.min(rounds, axis=0)


def _time(slots: Slots, size: int) -> float:
    """The seconds of a step of one slot over so many tokens."""
    ids, held, new = np.zeros((1, size), np.int64), np.zeros(1, np.int64), np.array([size])
    began = time.perf_counter()
    if size > 1:
        slots.session.step_rows(ids, held, new, size, True)
    else:
        slots.session.step(ids, held, new, True)
    return time.perf_counter() - began
