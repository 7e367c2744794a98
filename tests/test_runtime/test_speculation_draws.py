"""Sampled tokens have the ordinary distribution where they are guessed ahead.

V vocabulary.
"""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from runtime.artifact.integrity import read_artifact
from runtime.engine import Engine
from runtime.scheduler import Request, Scheduler
from runtime.speculation.costs import Costs
from runtime.speculation.ngram import NgramProposer
from runtime.text.sampling import Sampler, Sampling
from test_runtime.test_speculation import EARLIER, collect, speculate, tokens


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
        found = self.table[last]
        return found.argmax(-1) if argmax else found

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


def draw(engine, sampling):
    speculate(engine, costs=Costs((1.0,)))  # guesses at every token
    scheduler = Scheduler(engine, 1)
    (events,) = collect(scheduler, [Request([0], DRAWS, sampling, text=False)])
    assert scheduler.counters.accepted > DRAWS / 5
    assert scheduler.counters.proposed > scheduler.counters.accepted + DRAWS / 5
    return np.array([0, *tokens(events)])


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.8, top_k=4, top_p=0.9, seed=2)], ids=str)
def test_sampled_tokens_have_the_ordinary_distribution(markov, sampling):
    assert p_value(draw(markov, sampling), probabilities(markov.session.table, sampling)) > 1e-3


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
    assert p_value(draw(markov, sampling), probabilities(markov.session.table, sampling)) < 1e-9
