"""A bounded share of what `python -m test_trust.soak` does."""

from test_trust.soak import soak


def test_sequences_join_and_leave(artifact):
    found = soak(artifact, steps=3000, sequences=75)
    assert found.differing == 0
    assert len(found.cpu) >= 3000
    assert abs(found.growth) < 0.02
