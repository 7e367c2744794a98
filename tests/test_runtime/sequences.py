"""What tests of the scheduler ask of it, and how they read its answers."""

import numpy as np


def prompt(size, seed=0):
    return np.random.default_rng(seed).integers(3, 200, size).tolist()


def collect(scheduler, requests=()):
    """Begin the requests, step until nothing is left, and give each one's events."""
    found = {scheduler.begin(request): [] for request in requests}
    for event in scheduler.run():
        found.setdefault(event.sequence, []).append(event)
    return list(found.values())


def said(events):
    """What a caller sees of a sequence, apart from its number."""
    return [(e.token, e.text, e.logprob, e.top_logprobs, e.finish_reason) for e in events]
