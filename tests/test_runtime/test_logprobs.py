"""Logprobs of what is written and of the prompt, and prompts that begin as others did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import RequestError
from runtime.scheduler import Request, Scheduler
from runtime.scheduling.prefixes import PrefixCache
from runtime.text.sampling import Sampling
from test_runtime.sequences import collect, prompt, said


def log_softmax(logits):
    scores = logits.astype(np.float64)
    return scores - np.logaddexp.reduce(scores)


def test_logprobs_are_the_models_own(small):
    """Whatever the bias, the temperature and the penalty: those of the logits alone."""
    request = Request([40, 60], 6, Sampling(0.7, repetition_penalty=1.2, seed=1), logit_bias={7: 2.5}, logprobs=3)
    (events,) = collect(Scheduler(small, 3), [request])
    seen = [40, 60]
    for event in events:
        small.reset()
        expected = log_softmax(small.prefill([seen])[0])
        assert event.logprob == pytest.approx(expected[event.token], abs=1e-5)
        assert [token for token, _ in event.top_logprobs] == np.argsort(-expected, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in event.top_logprobs], np.sort(expected)[::-1][:3], atol=1e-5)
        seen.append(event.token)


def scores(engine, ids):
    """The logprob of each of the ids after those before it, token by token through `decode`."""
    engine.reset()
    logits, found = engine.prefill([ids[:1]])[0], []
    for token in ids[1:]:
        found.append(log_softmax(logits)[token])
        logits = engine.decode([token])[0]
    return found


def test_the_prompts_logprobs(small):
    """A graph that has the last token's logits alone is stepped token by token."""
    ids = prompt(21)
    expected = scores(small, ids)
    (events,) = collect(Scheduler(small, 3), [Request(ids, 2, logprobs=1, prompt_logprobs=1)])
    assert events[0].prompt_logprobs[0] is None
    assert [each.token for each in events[0].prompt_logprobs[1:]] == ids[1:]
    np.testing.assert_allclose([each.logprob for each in events[0].prompt_logprobs[1:]], expected, atol=1e-5)
    assert all(each.top[0][1] >= each.logprob for each in events[0].prompt_logprobs[1:])
    assert events[1].prompt_logprobs is None
    np.testing.assert_allclose(small.score(ids), expected, atol=1e-5)


def test_the_prompts_logprobs_of_a_graph_that_has_them(engines):
    engine, ids = engines("all logits"), prompt(21)
    expected = scores(engine, ids)
    np.testing.assert_allclose(engine.score(ids), expected, atol=1e-5)
    scheduler = Scheduler(engine, 2, chunk=8)
    first, second = collect(scheduler, [Request(ids, 0, prompt_logprobs=1), Request(ids, 3)])
    np.testing.assert_allclose([each.logprob for each in first[0].prompt_logprobs[1:]], expected, atol=1e-5)
    assert [event.token for event in second] == engine.generate_ids(ids, 3)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_continuations_of_one_context_compute_it_once(engines, small, logits):
    """From its start on the continuation is scored; what is before is computed in whole pieces and shared."""
    engine = small if logits == "last" else engines("all logits")
    context, ends = prompt(21), [[7, 8, 9], [9, 8], [5]]
    expected = [scores(engine, context + end)[20:] for end in ends]
    scheduler = Scheduler(engine, 1, chunk=8)
    asked = [Request(context + end, 0, prompt_logprobs=21) for end in ends]
    for (event,), wanted in zip(collect(scheduler, asked), expected, strict=True):
        assert event.prompt_logprobs[:21] == (None,) * 21
        np.testing.assert_allclose([each.logprob for each in event.prompt_logprobs[21:]], wanted, atol=1e-5)
    assert scheduler.counters.reused_tokens == 2 * 16
    with pytest.raises(RequestError, match="prompt_logprobs is '25'; expected an integer, 1 to 24"):
        scheduler.begin(Request(context + ends[0], 0, prompt_logprobs=25))


def test_a_second_turn_begins_where_the_first_was(engine):
    """The same bits with reuse and without; where rows were evicted, nothing is shared and that is counted."""
    first = Request(prompt(70), 8, logprobs=0)
    (answer,) = collect(Scheduler(engine, 3, chunk=16), [first])
    turn = [*first.ids, *(event.token for event in answer if event.token is not None), *prompt(9, seed=1)]
    second = Request(turn, 8, Sampling(1.0, seed=0), logprobs=0)
    (expected,) = collect(Scheduler(engine, 3, chunk=16), [second])
    scheduler = Scheduler(engine, 3, chunk=16)
    collect(scheduler, [first, Request(prompt(50, seed=2), 20)])
    (found,) = collect(scheduler, [second])
    assert said(found) == said(expected)
    reused = 32 if engine.graph.window else 64  # whole pieces of 16; the window has 40 rows
    assert found[-1].reused_tokens == scheduler.counters.reused_tokens == reused
    assert scheduler.counters.cache_hits == 1
    assert bool(scheduler.counters.unshared_pieces) == (engine.graph.window is not None)
    (alone,) = collect(scheduler, [Request(turn, 8, Sampling(1.0, seed=0), logprobs=0, reuse=False)])
    assert said(alone) == said(expected)
    assert alone[-1].reused_tokens == 0


def test_a_prompt_that_is_kept_whole_still_computes_its_end(small):
    scheduler = Scheduler(small, 3, chunk=16)
    found = [collect(scheduler, [Request(prompt(32), 4, logprobs=0)])[0] for _ in range(2)]
    assert [events[-1].reused_tokens for events in found] == [0, 16]
    assert said(found[0]) == said(found[1])


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), max_size=30), st.integers(0, 6))
def test_prefixes_are_bounded_and_right(prompts, most):
    """Every block found is that of the very ids before it, and no more than `most` are kept."""
    cache = PrefixCache(2, most * 8)
    for ids in prompts:
        found = cache.find(ids)
        assert len(found) <= (len(ids) - 1) // 2
        for index, (block,) in enumerate(found):
            assert block.tolist() == [int("1" + "".join(map(str, ids[: 2 * index + 2])))]
        for end in range(2, len(ids) + 1):
            key = cache.wants(ids[:end])
            if key is not None:
                cache.keep(key, [np.array([int("1" + "".join(map(str, ids[:end])))])])
        assert cache.used <= most * 8
        if most >= 4:
            assert len(cache.find(ids)) == (len(ids) - 1) // 2
