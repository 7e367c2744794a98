"""Speculation changes the number of steps and nothing else.

B slots, S new tokens, R rows of logits, V vocabulary.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime import RequestError, load
from runtime.artifact.manifest import Window
from runtime.engine import Engine
from runtime.scheduler import Request, Scheduler
from runtime.speculation.costs import Costs, measure
from runtime.speculation.options import GUESSES
from runtime.speculation.record import Record
from runtime.speculation.speculator import TRIALS, Speculator
from runtime.text.sampling import Sampling
from test_runtime.conftest import LENGTH
from test_runtime.sequences import collect

EARLIER = Path(__file__).parents[1] / "data" / "artifact-schema-1"  # a graph without `logits_index`
CHEAP = Costs((1.0, 1.05))  # a further token of a step costs a twentieth of one alone
DEAR = Costs((1.0, 1.3))
ROUNDING = 1e-3  # of logits of these models, between steps of one token and of several; int8 rounds activations


@pytest.fixture(scope="module", params=["dense", "int8", "hybrid", "eviction", "all logits"])
def engine(request, engines):
    return engines(request.param)


def repetitive(size, seed=0, period=7):
    """Ids of which most follow as they did before."""
    draw = np.random.default_rng(seed)
    ids = np.tile(draw.integers(3, 200, period), size // period + 1)[:size]
    ids[draw.random(size) < 0.1] = 5
    return ids.tolist()


def tokens(events):
    return [event.token for event in events if event.token is not None]


def check_same(engine, request, found, expected):
    """The same ids; or, where they part, two whose logits are nearer than kernels round. Returns whether it was so."""
    for at, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            assert request.sampling.greedy
            engine.reset()
            logits = engine.prefill([[*request.ids, *expected[:at]]])[0]
            assert abs(logits[one] - logits[other]) < ROUNDING
            return True
    assert len(found) == len(expected)
    return False


def speculate(engine, by="ngram", guesses=GUESSES, costs=CHEAP):
    """`Engine.speculate`, with costs of steps that do not depend on the machine."""
    engine.speculate(by, guesses)
    if by is not None:
        engine.speculation = replace(engine.speculation, costs=costs)


class Guesses:
    """A proposer whose guesses are what `make(ids, count)` says."""

    def __init__(self, make):
        self.make, self.made = make, Record()

    def record(self, sequence):
        self.made = Record()  # which is as hopeful as at first
        return self.made

    def limit(self, sequence):
        return None

    def propose(self, wanted):
        return [self.make(sequence.ids, count) for sequence, count in wanted]

    def forget(self, number):
        pass


@pytest.mark.parametrize("by", ["ngram", "wrong", "first right", "draft"])
def test_greedy_ids_are_the_ordinary_ones(engine, engines, by, record_property):
    """Three slots with joins between; right, wrong and half right guesses of a model or of the sequence itself."""
    requests = [Request(repetitive(size, size), new) for size, new in ((40, 60), (9, 30), (120, 73), (23, 50), (1, 40))]
    engine.speculate(None)
    expected = [tokens(events) for events in collect(Scheduler(engine, 3, chunk=16), requests)]
    speculate(engine, engines("dense") if by == "draft" else "ngram", 5)
    scheduler = Scheduler(engine, 3, chunk=16)
    known = {tuple(r.ids[:5]): [*r.ids, *ids] for r, ids in zip(requests, expected, strict=True)}

    def make(ids, count):
        if by == "wrong":
            return [211 - 1 - ids[-1]] * count
        right = next(k for start, k in known.items() if tuple(ids[: len(start)]) == start)[len(ids) :]
        return [*right[: min(2, count)], *([7] * count)][:count]

    if by in ("wrong", "first right"):
        scheduler._speculator = Speculator(Guesses(make), 5, CHEAP)
    found = [tokens(events) for events in collect(scheduler, requests)]
    ties = [check_same(engine, *each) for each in zip(requests, found, expected, strict=True)]
    record_property("ties", sum(ties))
    assert sum(ties) <= 1
    counters = scheduler.counters
    assert counters.new_tokens == sum(map(len, found))
    assert counters.accepted <= counters.proposed
    if by == "first right":
        assert counters.accepted > 20
    if by != "wrong":
        assert counters.proposed > 0
    if any("capacity" not in state.shape for state in engine.graph.states):
        return
    # every accepted guess is a token without a step of its own
    assert counters.accepted <= counters.new_tokens - counters.steps / 3


@pytest.mark.parametrize("name", ["dense", "eviction"])
def test_a_draft_that_is_the_model_is_always_right(engines, name):
    """So its caches hold what they should after every roll back; one draft of other weights is seldom right."""
    engine, draft = engines(name), engines(name)
    ids = np.random.default_rng(3).integers(3, 200, 50).tolist()
    speculate(engine, draft, 4)
    scheduler = Scheduler(engine, 2, chunk=16)
    requests = [Request(ids, 60), Request(ids[:7], 90)]
    found = collect(scheduler, requests)
    assert scheduler.counters.accepted > 60
    assert scheduler.counters.accepted == scheduler.counters.proposed
    engine.speculate(None)
    for request, events in zip(requests, found, strict=True):
        assert not check_same(engine, request, tokens(events), engine.generate_ids(request.ids, request.max_new_tokens))


def test_a_draft_that_others_use_meanwhile_reads_again(engines):
    engine, draft = engines("dense"), engines("dense")
    speculate(engine, draft, 4)
    found = []
    for token in engine.stream_ids(repetitive(30), 60):
        found.append(token)
        if len(found) in (10, 33):
            draft.generate_ids([4, 5], 3)
    engine.speculate(None)
    assert found == engine.generate_ids(repetitive(30), 60)


@pytest.mark.parametrize("name", ["dense", "hybrid", "eviction"])
def test_slots_that_fill_up(engines, name):
    """Sequences end where their slot is full, one after the other; none writes over another's rows."""
    engine = engines(name)
    requests = [Request(repetitive(size, size), 500) for size in (LENGTH - 3, LENGTH - 40, 100, LENGTH, LENGTH - 11)]
    engine.speculate(None)
    expected = [tokens(events) for events in collect(Scheduler(engine, 3, chunk=16), requests)]
    speculate(engine, "ngram", 12)
    found = [tokens(events) for events in collect(Scheduler(engine, 3, chunk=16), requests)]
    assert [len(ids) for ids in found] == [len(ids) for ids in expected]
    for request, *ids in zip(requests, found, expected, strict=True):
        check_same(engine, request, *ids)


def test_a_text_that_repeats_takes_few_steps(engines):
    engine = engines("dense")
    speculate(engine)
    scheduler = Scheduler(engine, 1)
    scheduler._speculator = Speculator(Guesses(lambda ids, count: [0] * 0), 8, CHEAP)
    scheduler.begin(Request(repetitive(40), 100))
    list(scheduler.run())
    plain = scheduler.counters.steps
    known = engine.generate_ids(repetitive(40), 100)
    scheduler = Scheduler(engine, 1)
    right = [*repetitive(40), *known]
    scheduler._speculator = Speculator(Guesses(lambda ids, count: right[len(ids) : len(ids) + count]), 8, CHEAP)
    scheduler.begin(Request(repetitive(40), 100))
    list(scheduler.run())
    assert plain == 99
    assert scheduler.counters.steps < 60


# What a request asks for, with and without speculation.


class Even:
    """A constraint: even ids, and an end after nine."""

    def __init__(self):
        self.taken = []

    def allowed(self):
        mask = np.arange(211) % 2 == 0
        if len(self.taken) == 9:
            mask[:] = False
            mask[2] = True
        return mask

    def advance(self, token):
        assert token % 2 == 0
        self.taken.append(token)


@pytest.mark.parametrize("asked", [
    {"sampling": Sampling(1.0, seed=3)},
    {"sampling": Sampling(0.7, 20, 0.9, 1.3, seed=4)},
    {"sampling": Sampling(0.0, repetition_penalty=1.2)},
    {"logit_bias": {17: 30.0, 18: 29.0}},
    {"logprobs": 2},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"stop_ids": tuple(range(60, 90))},
    {"prompt_logprobs": 4, "logprobs": 0},
], ids=str)  # fmt: skip
def test_requests_get_what_they_ask_for(engines, asked):
    engine = engines("dense")
    request = Request(**{"ids": repetitive(60), "max_new_tokens": 40, **asked})
    seen = []
    for by in (None, "ngram"):
        speculate(engine, by)
        (events,) = collect(Scheduler(engine, 3, chunk=16), [request])
        seen.append(events)
    plain, guessed = seen
    assert [(e.token, e.finish_reason, e.new_tokens) for e in guessed] == [
        (e.token, e.finish_reason, e.new_tokens) for e in plain
    ]
    for one, other in zip(guessed, plain, strict=True):
        assert (one.logprob is None) == (other.logprob is None)
        if one.logprob is not None:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]
    assert (guessed[0].prompt_logprobs is None) == (plain[0].prompt_logprobs is None)


def test_a_constraint_sees_what_was_chosen_and_nothing_else(engines):
    found = []
    for by in (None, "ngram"):
        engine, constraint = engines("dense"), Even()
        speculate(engine, by)
        (events,) = collect(Scheduler(engine, 1), [Request(repetitive(60), 40, stop_ids=(2,), constraint=constraint)])
        found.append((tokens(events), constraint.taken, events[-1].finish_reason))
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    assert found[0][2] == "stop"


def test_a_cancelled_sequence_ends_between_steps(engines):
    engine = engines("dense")
    speculate(engine)
    scheduler = Scheduler(engine, 2)
    numbers = [scheduler.begin(Request(repetitive(50, seed), 80)) for seed in (1, 2)]
    for _ in range(4):
        scheduler.step()
    scheduler.cancel(numbers[0])
    rest = list(scheduler.run())
    assert [e.finish_reason for e in rest if e.sequence == numbers[0]] == ["cancelled"]
    assert [e.finish_reason for e in rest if e.sequence == numbers[1]][-1] == "length"
    assert scheduler.idle


@pytest.mark.parametrize("most", [1, 3, 40])
def test_logprobs_of_a_prompt_are_read_in_pieces(engines, most, monkeypatch):
    """As many tokens at once as the session gives logits of, and the same values."""
    engine, ids = engines("dense"), repetitive(70)
    expected = engine.score(ids)
    monkeypatch.setattr(engine.session, "most_rows", most)
    np.testing.assert_allclose(engine.score(ids), expected, rtol=0, atol=1e-5)


# What is refused.


def described(engine, **changes):
    """An engine whose artifact says something else."""
    return Engine(replace(engine.artifact, graph=replace(engine.artifact.graph, **changes)), engine.session)


def test_what_cannot_be_checked_is_refused(engines):
    earlier = load(EARLIER)
    with pytest.raises(RequestError, match=r"artifact-schema-1: .* of several tokens a step; export it again with wm-"):
        earlier.speculate()
    assert earlier.speculation is None
    engine = engines("dense")
    with pytest.raises(RequestError, match=r"speculation is by 'lookup'; expected ngram or an engine"):
        engine.speculate("lookup")
    for guesses in (0, LENGTH, 2.5):
        with pytest.raises(RequestError, match=rf"guesses is '{guesses}'; expected an integer, 1 to {LENGTH - 1}"):
            engine.speculate("ngram", guesses)
    with pytest.raises(RequestError, match=r"has 180 tokens, .* has 211; expected a draft over the same tokenizer"):
        engine.speculate(described(engine, vocabulary=180))
    with pytest.raises(RequestError, match="is a classifier, and a draft is a language model"):
        engine.speculate(described(engine, labels=3))
    with pytest.raises(RequestError, match=r"has SSD states, which cannot be rolled back; expected a draft of atten"):
        engine.speculate(engines("hybrid"))
    draft = engines("dense")
    draft.graph = replace(draft.graph, max_batch=1)
    engine.speculate(draft)
    with pytest.raises(RequestError, match=r"the draft serves up to 1 slots, and 3 are asked for; take fewer slots"):
        Scheduler(engine)
    both = engines("hybrid")
    object.__setattr__(both.artifact.graph, "window", Window(24, 40))
    with pytest.raises(RequestError, match="SSD states and caches that evict rows, which speculation cannot roll back"):
        both.speculate()
    engine.session.most_rows = 1
    with pytest.raises(RequestError, match="its engine on CPU gives them of the last alone; use backend cpu or cuda"):
        engine.speculate()


def test_tokenizers_are_compared(engines):
    engine, draft = engines("dense"), engines("dense")
    engine.tokenizer, draft.tokenizer = load(EARLIER).tokenizer, load(EARLIER).tokenizer
    engine.speculate(draft)
    text = json.loads(engine.tokenizer.to_str())
    names = sorted(text["model"]["vocab"], key=text["model"]["vocab"].get)[-2:]
    first, second = (text["model"]["vocab"][name] for name in names)
    text["model"]["vocab"] |= {names[0]: second, names[1]: first}
    draft.tokenizer = type(draft.tokenizer).from_str(json.dumps(text))
    with pytest.raises(RequestError, match=r": the token .* has id \d+; expected \d+, as in the other"):
        engine.speculate(draft)


# What they cost.


@pytest.mark.parametrize("name", ["dense", "hybrid", "eviction"])
def test_costs_are_timed_on_the_session(engines, name):
    engine, draft = engines(name), engines("dense")
    engine.generate_ids([5, 6], 3)
    costs = measure(engine, draft)
    assert costs.steps[0] == 1.0
    assert list(costs.steps) == sorted(costs.steps)
    assert len(costs.steps) == min(16, engine.session.chunk)
    assert costs.guess > 0
    assert measure(engine).guess == 0
    assert not engine.lengths.size
    assert engine.generate_ids([5, 6], 3) == engines(name).generate_ids([5, 6], 3)


def test_wrong_guesses_cost_little(engines):
    """What is spent on wrong guesses is a few hundredths of all."""
    engine = engines("dense")
    speculate(engine)

    class Wrong(Guesses):
        def record(self, sequence):
            return self.made

    scheduler = Scheduler(engine, 1)
    scheduler._speculator = Speculator(Wrong(lambda ids, count: [211 - 1 - ids[-1]] * count), 8, DEAR)
    scheduler.begin(Request(repetitive(20), 170))
    list(scheduler.run())
    assert 0 < scheduler.counters.proposed < (2 * TRIALS / (DEAR.of(1, 1) - 1) + 0.02) * 170
