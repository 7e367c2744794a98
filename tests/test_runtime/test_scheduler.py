"""Sequences share slots: each gets what it gets alone, to the bit, and waits for one piece of a prompt at most."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import RequestError
from runtime.engine import Engine
from runtime.scheduler import Event, Request, Scheduler
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import pieces, until
from test_runtime.conftest import LENGTH
from test_runtime.sequences import collect, prompt, said

REQUESTS = st.tuples(
    st.integers(1, 60),  # the prompt's tokens
    st.integers(1, 12),  # new ones
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([None, 2]),  # logprobs
    st.integers(0, 9),  # the step before which it begins
    st.sampled_from([None, None, None, 3, 12]),  # the step before which it is cancelled
)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_company_changes_nothing(engine, data):
    """Joins and leaves at random: tokens, texts and logprobs are the same bits as alone on the same scheduler."""
    plans = data.draw(st.lists(REQUESTS, min_size=2, max_size=7))
    requests = [
        Request(prompt(size, index), new, Sampling(temperature, seed=index), logprobs=logprobs)
        for index, (size, new, temperature, logprobs, _, _) in enumerate(plans)
    ]
    alone = [said(collect(Scheduler(engine, 3, chunk=16), [request])[0]) for request in requests]
    scheduler, numbers, events = Scheduler(engine, 3, chunk=16), {}, {}
    for step in range(1000):
        for index, (*_, begins, ends) in enumerate(plans):
            if step == begins:
                numbers[index] = scheduler.begin(requests[index])
            if ends is not None and step == begins + ends:
                scheduler.cancel(numbers[index])
        if step > 21 and scheduler.idle:
            break
        for event in scheduler.step():
            events.setdefault(event.sequence, []).append(event)
    for index, expected in enumerate(alone):
        found = said(events[numbers[index]])
        if found[-1][-1] == "cancelled":
            assert found[:-1] == expected[: len(found) - 1]
        else:
            assert found == expected
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert not engine.lengths.any()


def test_a_step_computes_the_slots_in_use(engine):
    """A lone request costs one slot, or the few that the kernels take at once, wherever others have been."""
    scheduler, least = Scheduler(engine, 3), engine.session.row_multiple
    collect(scheduler, [Request(prompt(5, seed), 3 + 9 * seed) for seed in range(3)])
    assert scheduler.counters.steps == 20
    several = 2 * -(-3 // least) * least + 9 * -(-2 // least) * least
    assert scheduler.counters.rows == several + 9 * least
    lone = Scheduler(engine, 3, exact=False)
    collect(lone, [Request(prompt(9), 8)])
    assert lone.counters.rows == lone.counters.steps == 7


def test_a_step_reads_the_rows_in_use(engines):
    """After a long sequence has ended, those that go on need a small capacity again, and get the same bits."""
    engine = engines("one head")
    request = Request(prompt(20), 30, Sampling(1.0, seed=0), logprobs=0)
    alone = said(collect(Scheduler(engine, 3, chunk=16), [request])[0])
    scheduler, capacities, events = Scheduler(engine, 3, chunk=16), [], []
    long = scheduler.begin(Request(prompt(150), 3))
    number = scheduler.begin(request)
    while not scheduler.idle:
        events += [event for event in scheduler.step() if event.sequence == number]
        capacities.append(engine.session.capacity)
    assert (max(capacities), capacities[-1]) == (LENGTH, 64)
    assert long < number
    assert said(events) == alone


def test_a_long_prompt_holds_nobody_up(small):
    """Each step brings every running sequence a token and computes one piece; those that begin take turns."""
    scheduler = Scheduler(small, 3, chunk=16)
    running = scheduler.begin(Request(prompt(5), 40))
    scheduler.step()
    long = scheduler.begin(Request(prompt(160), 2))
    steps = [[event.sequence for event in scheduler.step()] for _ in range(4)]
    assert steps == [[running]] * 4
    short = scheduler.begin(Request(prompt(7), 2))
    steps = [[event.sequence for event in scheduler.step()] for _ in range(7)]
    assert all(running in step for step in steps)
    assert min(index for index, step in enumerate(steps) if short in step) <= 1
    assert min(index for index, step in enumerate(steps) if long in step) == 6  # ten pieces, one step for the short one


def test_pieces_of_short_prompts_share_a_step(small):
    scheduler = Scheduler(small, 3, chunk=16)
    numbers = [scheduler.begin(Request(prompt(size), 5)) for size in (5, 6, 7)]
    assert [event.sequence for event in scheduler.step()] == numbers[:2]


def test_cancel(small):
    """One that waits, one whose prompt is computed and one that runs: each ends once, and its slot is free at once."""
    scheduler = Scheduler(small, 2, chunk=16)
    running, begun, waits = (scheduler.begin(Request(prompt(size), 20)) for size in (3, 100, 5))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    for number in (running, begun, waits):
        scheduler.cancel(number)
    scheduler.cancel(running)
    assert (scheduler.running, scheduler.waiting, scheduler.idle) == (0, 0, False)
    after = [scheduler.begin(Request(prompt(4), 3)) for _ in range(2)]
    events = scheduler.step()
    assert [(e.sequence, e.token, e.finish_reason) for e in events[:3]] == [
        (each, None, "cancelled") for each in (running, begun, waits)
    ]
    assert events[0].new_tokens == 1
    assert [event.sequence for event in events[3:]] == after
    list(scheduler.run())
    scheduler.cancel(after[0])
    assert scheduler.idle


def test_finish_reasons(small):
    ids = small.generate_ids(prompt(20), 12)
    text = small.tokenizer.decode(ids)
    scheduler = Scheduler(small, 3)

    def end(**options):
        *_, last = collect(scheduler, [Request(prompt(20), **options)])[0]
        return last.finish_reason, last.new_tokens, last.token

    assert end(max_new_tokens=12) == ("length", 12, ids[-1])
    assert end(max_new_tokens=0) == ("length", 0, None)
    assert end(stop_ids=(ids[4],)) == ("stop", ids.index(ids[4]), None)
    reason, count, token = end(max_new_tokens=12, stop=(text[3:5],))
    assert (reason, token) == ("stop", ids[count - 1])
    *_, last = collect(scheduler, [Request(prompt(190), 20)])[0]
    assert (last.finish_reason, last.new_tokens) == ("length", 3)  # 192 tokens to a slot, and the last needs no row


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), at=st.integers(0, 30), length=st.integers(1, 6))
def test_stop_strings_across_pieces(small, seed, at, length):
    """A stop cut out of the text that comes: the events' texts are that text up to the first place where it is."""
    sampling = Sampling(1.0, seed=seed)
    ids = small.generate_ids([40, 50], 30, temperature=1.0, seed=seed)
    whole = "".join(pieces(small.tokenizer, ids))
    stop = whole[at : at + length]
    stops = (stop, "never there") if stop else ("never there",)
    (events,) = collect(Scheduler(small, 3), [Request([40, 50], 30, sampling, stops)])
    assert "".join(event.text for event in events) == "".join(until(pieces(small.tokenizer, ids), stops))
    assert (events[-1].finish_reason == "stop") == (bool(stop) or len(ids) < 30)
    assert [event.token for event in events if event.token is not None] == ids[: events[-1].new_tokens]


def test_each_has_its_own_draws(small):
    seeds = [1, 2, 1]
    found = collect(Scheduler(small, 3), [Request([40], 12, Sampling(1.0, seed=seed)) for seed in seeds])
    ids = [[event.token for event in events if event.token is not None] for events in found]
    assert ids[0] == ids[2] == small.generate_ids([40], 12, temperature=1.0, seed=1)
    assert ids[0] != ids[1]


def test_a_bias_and_a_constraint_decide(small):
    class Even:
        """Even ids alone, until three are there; then an end id."""

        def __init__(self):
            self.taken = []

        def allowed(self):
            ids = np.arange(260)
            return ids == 2 if len(self.taken) == 3 else ids % 2 == 0

        def advance(self, token):
            self.taken.append(token)

    rules = [Even(), Even()]
    scheduler = Scheduler(small, 3)
    requests = [
        Request([40], 9, Sampling(2.0, seed=3), constraint=rules[0]),
        Request([40], 4, logit_bias={77: 1000.0}),
        Request([40], 9, logit_bias={78: 1000.0}, constraint=rules[1]),
    ]
    first, second, third = collect(scheduler, requests)
    assert first[-1].finish_reason == third[-1].finish_reason == "stop"
    assert [event.token for event in first[:-1]] == rules[0].taken
    assert [event.token for event in second] == [77] * 4
    assert rules[1].taken == [78] * 3
    rules[0].allowed = lambda: np.zeros(260, bool)
    (events,) = collect(scheduler, [Request([40], 9, constraint=rules[0])])
    assert events[-1].finish_reason == "error"
    assert "allows no token" in events[-1].error


def test_logits_that_are_not_finite_end_one_sequence(small, monkeypatch):
    """The others go on, and who has the slot next gets what it gets alone."""
    requests = [Request(prompt(9, seed), 8, logprobs=0) for seed in range(3)]
    alone = [said(collect(Scheduler(small, 3), [request])[0]) for request in requests]
    scheduler, step, calls = Scheduler(small, 2), small.session.step, []

    def broken(*arguments):
        found = step(*arguments)
        calls.append(1)
        if len(calls) == 3:
            small.session.caches[0][0] = np.nan
            found = found.copy()
            found[0, 5] = np.nan
        return found

    monkeypatch.setattr(small.session, "step", broken)
    found = collect(scheduler, requests)
    assert found[0][-1].finish_reason == "error"
    assert "after token 12 are not finite" in found[0][-1].error
    assert said(found[0][:-1]) == alone[0][: len(found[0]) - 1]
    assert [said(events) for events in found[1:]] == alone[1:]


def test_a_step_that_fails_ends_those_that_took_part(small, monkeypatch):
    def fail(*arguments):
        raise RequestError("out of memory")

    scheduler = Scheduler(small, 1)
    with monkeypatch.context() as patch:
        patch.setattr(small.session, "step", fail)
        first, second = collect(scheduler, [Request([40], 5), Request([41], 1)])
    assert [(event.finish_reason, event.error) for event in first] == [(None, None), ("error", "out of memory")]
    assert [event.finish_reason for event in second] == ["length"]
    assert said(collect(scheduler, [Request([40], 5)])[0])[-1][-1] == "length"


def test_usage_and_counters(small):
    scheduler = Scheduler(small, 3)
    found = collect(scheduler, [Request(prompt(9), 4), Request(prompt(5), 2, text=False)])
    assert [(events[-1].prompt_tokens, events[-1].new_tokens) for events in found] == [(9, 4), (5, 2)]
    assert [sum(event.finish_reason is not None for event in events) for events in found] == [1, 1]
    assert (scheduler.counters.prompt_tokens, scheduler.counters.new_tokens) == (14, 6)
    assert any(event.text for event in found[0])
    assert not any(event.text for event in found[1])


def test_slots_that_another_call_uses(small):
    scheduler = Scheduler(small, 3)
    scheduler.begin(Request([40], 9))
    scheduler.step()
    small.reset()
    with pytest.raises(RequestError, match="another call used these slots"):
        scheduler.step()
    scheduler = Scheduler(small, 3)
    expected = said(collect(scheduler, [Request([40], 9)])[0])
    small.generate_ids([40], 2)
    assert said(collect(scheduler, [Request([40], 9)])[0]) == expected  # nothing was under way


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [1, 300]}, "token id 300 at position 1"),
        ({"ids": [1] * 193}, "193 tokens; this artifact's capacity is 192"),
        ({"max_new_tokens": -1}, "max_new_tokens is '-1'; expected an integer, 0 or more"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"logprobs": -1}, "logprobs is '-1'; expected an integer, 0 to 260"),
        ({"logit_bias": {260: 1.0}}, "a token id of logit_bias is '260'; expected an integer, 0 to 259"),
        ({"logit_bias": {2: float("nan")}}, "logit_bias of token id 2 is nan"),
    ],
)
def test_requests_that_are_refused(small, options, words):
    scheduler = Scheduler(small, 3)
    with pytest.raises(RequestError, match=words):
        scheduler.begin(Request(**{"ids": [1], **options}))
    assert scheduler.idle


def test_schedulers_that_are_refused(small, engines):
    with pytest.raises(RequestError, match="slots is '4'; expected an integer, 1 to 3"):
        Scheduler(small, 4)
    with pytest.raises(RequestError, match="chunk is '0'; expected an integer, 1 or more"):
        Scheduler(small, 1, chunk=0)
    with pytest.raises(RequestError, match="has no tokenizer"):
        Scheduler(engines("one head")).begin(Request([1], stop=("x",)))


def test_events_of_one_request(small):
    events = list(small.events(Request([40, 41], 5)))
    assert isinstance(small, Engine)
    assert all(isinstance(event, Event) for event in events)
    assert [event.token for event in events] == small.generate_ids([40, 41], 5)
