"""Speculation changes the number of steps and nothing else.

B slots, S new tokens, R rows of logits, V vocabulary.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import SMALL as SIZES
from conftest import ours, randomise, rival
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export.conftest import HYBRID, lowered, save_checkpoint

from export import OnnxOptions, export_onnx
from runtime import RequestError, load
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import Window
from runtime.engine import Engine
from runtime.scheduler import Request, Scheduler
from runtime.speculation import record
from runtime.speculation.ngram import LONGEST, Match, NgramProposer
from runtime.speculation.record import Record, best_guesses, expected_tokens
from runtime.speculation.speculator import TRIALS, Speculator
from runtime.text.sampling import Sampler, Sampling
from wm_models import CheemsConfig, CheemsForCausalLM

EARLIER = Path(__file__).parents[1] / "data" / "artifact-schema-1"  # a graph without `logits_index`
LENGTH = 192
ROUNDING = 1e-3  # of logits of these models, between steps of one token and of several; int8 rounds activations

OPTIONS = {"int8": {"quantize": "int8", "block_size": 16}, "all logits": {"logits": "all"}}


def model_of(name):
    if name == "hybrid":
        model = CheemsForCausalLM(CheemsConfig(**SIZES, **HYBRID))
        randomise(model)
        return model
    changes = {"keep_window_size": 24} if name == "window" else {}
    return ours(rival(**changes), expert_routing="token")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """`engines(name)`: engines of one artifact each, 3 slots of LENGTH tokens, no two of one name the same object."""
    made = {}

    def engine(name) -> Engine:
        if name not in made:
            directory = made[name] = tmp_path_factory.mktemp("made") / "artifact"
            if name in OPTIONS:
                checkpoint = save_checkpoint(directory.parent / "checkpoint")
                export_onnx(checkpoint, directory, OnnxOptions(max_length=LENGTH, max_batch=3, **OPTIONS[name]))
            else:
                spare = {"spare": 16} if name == "window" else {}
                lowered(directory, model_of(name), max_length=LENGTH, max_batch=3, **spare)
        return load(made[name], threads=1)

    return engine


@pytest.fixture(scope="module", params=["dense", "int8", "hybrid", "window", "all logits"])
def engine(request, engines):
    return engines(request.param)


def repetitive(size, seed=0, period=7):
    """Ids of which most follow as they did before."""
    draw = np.random.default_rng(seed)
    ids = np.tile(draw.integers(3, 200, period), size // period + 1)[:size]
    ids[draw.random(size) < 0.1] = 5
    return ids.tolist()


def collect(scheduler, requests=()):
    found = {scheduler.begin(request): [] for request in requests}
    for event in scheduler.run():
        found.setdefault(event.sequence, []).append(event)
    return list(found.values())


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


class Guesses:
    """A proposer whose guesses are what `make(ids, count)` says."""

    cost = 0.0

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
    engine.speculate(engines("dense") if by == "draft" else "ngram", 5)
    scheduler = Scheduler(engine, 3, chunk=16)
    known = {tuple(r.ids[:5]): [*r.ids, *ids] for r, ids in zip(requests, expected, strict=True)}

    def make(ids, count):
        if by == "wrong":
            return [211 - 1 - ids[-1]] * count
        right = next(k for start, k in known.items() if tuple(ids[: len(start)]) == start)[len(ids) :]
        return [*right[: min(2, count)], *([7] * count)][:count]

    if by in ("wrong", "first right"):
        scheduler._speculator = Speculator(Guesses(make), 5)
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


@pytest.mark.parametrize("name", ["dense", "window"])
def test_a_draft_that_is_the_model_is_always_right(engines, name):
    """So its caches hold what they should after every roll back; one draft of other weights is seldom right."""
    engine, draft = engines(name), engines(name)
    ids = np.random.default_rng(3).integers(3, 200, 50).tolist()
    engine.speculate(draft, 4)
    scheduler = Scheduler(engine, 2, chunk=16)
    assert scheduler._speculator is not None
    scheduler._speculator.proposer.cost = 0.01
    requests = [Request(ids, 60), Request(ids[:7], 90)]
    found = collect(scheduler, requests)
    assert scheduler.counters.accepted > 60
    assert scheduler.counters.accepted == scheduler.counters.proposed
    engine.speculate(None)
    for request, events in zip(requests, found, strict=True):
        assert not check_same(engine, request, tokens(events), engine.generate_ids(request.ids, request.max_new_tokens))


def test_a_draft_that_others_use_meanwhile_reads_again(engines):
    engine, draft = engines("dense"), engines("dense")
    engine.speculate(draft, 4)
    found = []
    for token in engine.stream_ids(repetitive(30), 60):
        found.append(token)
        if len(found) in (10, 33):
            draft.generate_ids([4, 5], 3)
    engine.speculate(None)
    assert found == engine.generate_ids(repetitive(30), 60)


@pytest.mark.parametrize("name", ["dense", "hybrid", "window"])
def test_slots_that_fill_up(engines, name):
    """Sequences end where their slot is full, one after the other; none writes over another's rows."""
    engine = engines(name)
    requests = [Request(repetitive(size, size), 500) for size in (LENGTH - 3, LENGTH - 40, 100, LENGTH, LENGTH - 11)]
    engine.speculate(None)
    expected = [tokens(events) for events in collect(Scheduler(engine, 3, chunk=16), requests)]
    engine.speculate("ngram", 12)
    found = [tokens(events) for events in collect(Scheduler(engine, 3, chunk=16), requests)]
    assert [len(ids) for ids in found] == [len(ids) for ids in expected]
    for request, *ids in zip(requests, found, expected, strict=True):
        check_same(engine, request, *ids)


def test_a_text_that_repeats_takes_few_steps(engines):
    engine = engines("dense")
    engine.speculate("ngram")
    scheduler = Scheduler(engine, 1)
    scheduler._speculator = Speculator(Guesses(lambda ids, count: [0] * 0), 8)
    scheduler.begin(Request(repetitive(40), 100))
    list(scheduler.run())
    plain = scheduler.counters.steps
    known = engine.generate_ids(repetitive(40), 100)
    scheduler = Scheduler(engine, 1)
    right = [*repetitive(40), *known]
    scheduler._speculator = Speculator(Guesses(lambda ids, count: right[len(ids) : len(ids) + count]), 8)
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
        engine.speculate(by)
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
        engine.speculate(by)
        (events,) = collect(Scheduler(engine, 1), [Request(repetitive(60), 40, stop_ids=(2,), constraint=constraint)])
        found.append((tokens(events), constraint.taken, events[-1].finish_reason))
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    assert found[0][2] == "stop"


def test_a_cancelled_sequence_ends_between_steps(engines):
    engine = engines("dense")
    engine.speculate("ngram")
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


# Sampled tokens have the ordinary distribution.


class MarkovSession:
    """A session without a graph: the logits after a token are its row of a table (V, V)."""

    device_name, row_multiple, capacity, batch = "Markov", 1, 1 << 20, 0

    def __init__(self, graph, table):
        self.graph, self.table, self.chunk, self.most_rows = graph, table, 64, 64

    def allocate(self, batch, capacity):
        self.batch = batch

    def clear_slot(self, slot):
        pass

    def step(self, ids, cache_lengths, lengths, argmax=False):
        return self.step_rows(ids, cache_lengths, lengths, 1, argmax)[:, 0]

    def step_rows(self, ids, cache_lengths, lengths, rows, argmax=False):
        last = np.stack([row[max(n - rows, 0) : n][-rows:] for row, n in zip(ids, lengths, strict=True)])
        assert not argmax
        return self.table[last]

    def step_slot(self, slot, ids, cache_lengths, argmax=False, rows=1):
        return self.table[ids[-rows:]]


DRAWS, VOCABULARY = 100_000, 6


@pytest.fixture(scope="module")
def markov():
    """An engine over a table, whose rows are far from uniform, with room for all of the draws."""
    artifact = read_artifact(EARLIER)
    longest = DRAWS + 10
    graph = replace(
        artifact.graph, vocabulary=VOCABULARY, max_length=longest, capacities=(longest,), states=(), window=None
    )
    table = np.random.default_rng(0).normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32)
    engine = Engine(replace(artifact, graph=graph), MarkovSession(graph, table))
    engine.end_ids = frozenset()
    return engine


def probabilities(table, sampling):
    """(V, V): what a row's logits become by temperature, top-k and top-p, computed in another way than the sampler."""
    scores = table.astype(np.float64) / sampling.temperature
    found = np.exp(scores - scores.max(1, keepdims=True))
    found /= found.sum(1, keepdims=True)
    for row in found:
        ranked = sorted(range(VOCABULARY), key=lambda token: -row[token])
        kept, mass = [], 0.0
        total = row[ranked[: sampling.top_k or VOCABULARY]].sum()
        for token in ranked[: sampling.top_k or VOCABULARY]:
            kept.append(token)
            mass += row[token] / total
            if mass >= sampling.top_p:
                break
        row[[token for token in range(VOCABULARY) if token not in kept]] = 0
    return found / found.sum(1, keepdims=True)


def p_value(ids, expected):
    """Of Pearson's chi-squared test on the pairs of a token and the next."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    assert not counts[expected == 0].any()
    wanted = counts.sum(1, keepdims=True) * expected
    kept = expected > 0
    statistic = ((counts - wanted)[kept] ** 2 / wanted[kept]).sum()
    return float(scipy.stats.chi2.sf(statistic, (kept.sum(1) - 1).sum()))


def draw(engine, sampling, patch):
    patch.setattr(record, "ROW_COST", 0.0)  # guesses at every token
    patch.setattr(record, "CHECK_COST", 0.0)
    engine.speculate("ngram")
    scheduler = Scheduler(engine, 1)
    (events,) = collect(scheduler, [Request([0], DRAWS, sampling, text=False)])
    assert scheduler.counters.accepted > DRAWS / 5
    assert scheduler.counters.proposed > scheduler.counters.accepted + DRAWS / 5
    return np.array([0, *tokens(events)])


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.8, top_k=4, top_p=0.9, seed=2)], ids=str)
def test_sampled_tokens_have_the_ordinary_distribution(markov, sampling, monkeypatch):
    assert p_value(draw(markov, sampling, monkeypatch), probabilities(markov.session.table, sampling)) > 1e-3


def test_the_test_catches_a_sampler_that_favours_guesses(markov, monkeypatch):
    """A mutant: where a guess is not drawn, it draws again, so a guess g comes with p(g) · (2 - p(g))."""
    guessed, propose, choose = {}, NgramProposer.propose, Sampler._one

    def noted(self, wanted):
        found = propose(self, wanted)
        for (sequence, _), guesses in zip(wanted, found, strict=True):
            guessed.update(enumerate(guesses, len(sequence.ids)))
        return found

    def favouring(self, logits, seen):
        token = choose(self, logits, seen)
        return token if guessed.get(len(seen), token) == token else choose(self, logits, seen)

    monkeypatch.setattr(NgramProposer, "propose", noted)
    monkeypatch.setattr(Sampler, "_one", favouring)
    sampling = Sampling(1.0, seed=1)
    assert p_value(draw(markov, sampling, monkeypatch), probabilities(markov.session.table, sampling)) < 1e-9


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
    with pytest.raises(RequestError, match=r"tokenizer\.json: token .* has id \d+; expected \d+, as in the other"):
        engine.speculate(draft)


# Which guesses are made.


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
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.5, 2) == 1.75
    assert best_guesses([0.1], [8], 0, 1, 0.0) == 0
    assert best_guesses([0.99], [8], 0, 1, 0.0) == 8
    assert 0 < best_guesses([0.7], [8], 0, 1, 0.0) < 5
    assert best_guesses([0.5], [8], 0, 1, 0.0) == 0
    assert best_guesses([0.6], [8], 7, 8, 0.0) == 0  # seven others would wait for the guesses of one
    assert best_guesses([0.95] * 8, [8] * 8, 0, 8, 0.0) > 0
    assert best_guesses([0.9], [8], 0, 1, 2.0) == 0  # a draft that is slower than the model


def test_wrong_guesses_cost_little(engines):
    """By the cost of steps that the choice assumes: what is spent on wrong guesses is a few hundredths of all."""
    engine = engines("dense")
    engine.speculate("ngram")

    class Wrong(Guesses):
        def record(self, sequence):
            return self.made

    scheduler = Scheduler(engine, 1)
    scheduler._speculator = Speculator(Wrong(lambda ids, count: [211 - 1 - ids[-1]] * count), 8)
    scheduler.begin(Request(repetitive(20), 170))
    list(scheduler.run())
    assert 0 < scheduler.counters.proposed < (2 * TRIALS / 0.3 + 0.02) * 170
