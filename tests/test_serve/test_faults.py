"""Clients that misbehave: no answer is wrong and no slot is leaked, in a short run of the long command."""

import pytest

from test_serve.faults import run

pytestmark = pytest.mark.slow


def test_no_client_harms_another(artifact):
    found = run(artifact, 160, clients=8)
    assert found.wrong == []
    assert found.outcomes["whole 200"] + found.outcomes["stream 200"] > 50
    assert found.outcomes["left"] > 5
