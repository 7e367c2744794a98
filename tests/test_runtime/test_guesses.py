"""Which guesses are made, and how many."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.speculation import record
from runtime.speculation.costs import Costs
from runtime.speculation.ngram import LONGEST, Match
from runtime.speculation.record import Record
from runtime.speculation.speculator import MARGIN, best_guesses
from test_runtime.test_speculation import CHEAP, DEAR


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9))
def test_a_match_is_followed(ids, count):
    """Read in pieces: the ids before the place equal the last ones, and the guesses are what came after it."""
    match = Match()
    for end in sorted({1, len(ids) // 2 + 1, len(ids)} & set(range(1, len(ids) + 1))):
        match.read(ids[:end])
    if not match.length:
        assert ids[-1] not in ids[:-1]
        return
    assert match.place < len(ids)
    assert ids[match.place - match.length : match.place] == ids[len(ids) - match.length :]
    suffixes = [n for n in range(1, LONGEST + 1) if any(ids[i - n : i] == ids[-n:] for i in range(n, len(ids)))]
    assert match.length >= max(suffixes)
    guesses = match.guesses(ids, count)
    assert len(guesses) == count
    assert [*ids, *guesses][match.place : match.place + count] == guesses


def test_a_record_follows_what_was_right():
    known = Record()
    assert known.rate == record.FIRST_RATE
    assert Record(0.3).rate == 0.3
    assert Record().most == 2
    for _ in range(30):
        known.note(4, 4)
    assert known.rate > 0.9
    assert known.most > 20
    for _ in range(30):
        known.note(4, 0)  # one that was wrong, and three that nothing is known of
    assert 0.1 < known.rate < 0.35
    certain = Record(0.5)
    certain.note(8, 3)
    weights = 0.95 ** np.arange(5)[::-1]  # what was assumed, three right guesses, and a wrong one
    assert certain.rate == pytest.approx((0.5 * weights[0] + weights[1:4].sum()) / weights.sum())


def test_guesses_are_worth_their_cost():
    assert best_guesses([0.1], [8], 0, 1, DEAR) == 0
    assert best_guesses([0.99], [8], 0, 1, DEAR) == 8
    assert 0 < best_guesses([0.7], [8], 0, 1, DEAR) < 5
    assert best_guesses([0.5], [8], 0, 1, DEAR) > 0
    assert best_guesses([0.3], [8], 0, 1, DEAR) == 0
    assert best_guesses([0.6], [8], 7, 8, DEAR) == 0  # seven others would wait for the guesses of one
    assert best_guesses([0.95] * 8, [8] * 8, 0, 8, DEAR) > 0
    slow = replace(DEAR, first_guess=2.0, guess=2.0)  # a draft that is slower than the model
    assert best_guesses([0.9], [8], 0, 1, slow) == 0
    assert best_guesses([0.3], [8], 0, 1, CHEAP) > 0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.lists(st.floats(0, 0.8), min_size=1, max_size=15),
    st.tuples(st.floats(0, 0.5), st.floats(0, 0.2)),
)
def test_the_best_number_is_found(sequences, others, more, draft):
    """By the closed form of a geometric sum, for every number."""
    costs, slots = Costs(tuple(np.cumsum([1.0, *more]).tolist()), *draft), len(sequences) + others

    def gain(guesses):
        tokens = sum(
            min(guesses, limit) + 1 if rate == 1 else (1 - rate ** (min(guesses, limit) + 1)) / (1 - rate)
            for rate, limit in sequences
        )
        return (tokens + others) / costs.of(slots, guesses)

    rates, limits = zip(*sequences, strict=True)
    found = best_guesses(rates, limits, others, slots, costs)
    gains = [MARGIN * gain(0), *(gain(guesses) for guesses in range(1, max(limits) + 1))]
    assert gains[found] == pytest.approx(max(gains), rel=1e-9)


def test_costs_are_those_of_steps():
    costs = Costs((1.0, 1.5, 1.8), first_guess=0.3, guess=0.1)
    assert costs.of(1, 0) == 1.0
    assert costs.of(1, 1) == pytest.approx(1.5 + 0.3)
    assert costs.of(3, 0) == pytest.approx(1.8)
    assert costs.of(2, 2) == pytest.approx(1.8 + 3 * 0.4 + 0.3 + 0.1)  # six tokens, of which three were not timed
    assert Costs((1.0,)).of(4, 3) == 1.0
