"""Slots: what a call returns is the caller's, only integers are ids, and a closed engine says so."""

import re
from pathlib import Path

import numpy as np
import pytest

from runtime import RequestError, load
from runtime.engine import Engine
from runtime.text.sampling import Sampling

SMALL = Path(__file__).parents[1] / "data" / "artifact-schema-1"


@pytest.fixture
def engine():
    with load(SMALL, "cpu") as engine:
        yield engine


def test_what_a_call_returns_is_the_caller_s(engine):
    """A later step changes none of it."""
    rows = [engine.prefill([[5, 6, 7]])]
    rows += [engine.decode([token]) for token in (8, 9, 10)]
    assert len({row.tobytes() for row in rows}) == 4
    engine.reserve(2, 20)
    rows.append(engine.join(0, [5, 6, 7]))
    kept = [row.copy() for row in rows]
    engine.join(1, [1, 2])
    engine.decode([3, 4])
    for row, copy in zip(rows, kept, strict=True):
        np.testing.assert_array_equal(row, copy)
        assert row.flags.owndata
        row[...] = 0
    np.testing.assert_allclose(kept[4], kept[0][0], rtol=0, atol=1e-5)


def named(value):
    """A test's name, which is the same in every process: an object's type where it shows its address."""
    return re.sub(r" at 0x\w+", "", repr(value))


NO_IDS = [
    "5", b"5", bytearray(b"5"), {5, 6}, {5: 6}, None, 5, 5.0, True, object(), iter([5]),
    [5.9, 6.9], [5, 6.0], [True, True], [5, True], [np.True_, 5], ["5"], [None], [[5], [6, 7]], [], [5, 1 << 80],
    np.array([5.0]), np.array([True]), np.array(["5"]), np.array(5), np.array([None]), [5 + 0j],
]  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS, ids=named)
@pytest.mark.parametrize("call", ["prefill", "decode", "join", "generate_ids", "stream_ids", "append"])
def test_only_integers_are_ids(engine, call, ids):
    engine.reserve(1, 20)
    calls = {
        "prefill": lambda: engine.prefill([ids]),
        "append": lambda: engine.append(ids, argmax=True),
        "decode": lambda: engine.decode(ids),
        "join": lambda: engine.join(0, ids),
        "generate_ids": lambda: engine.generate_ids(ids),
        "stream_ids": lambda: next(engine.stream_ids(ids)),
    }
    with pytest.raises(RequestError, match="expected") as caught:
        calls[call]()
    assert "\n" not in str(caught.value)
    assert engine.lengths.tolist() == [0]


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), range(5, 7), np.array([5, 6]), np.array([5, 6], np.uint8)], ids=named)
def test_integers_in_any_sequence_are_ids(engine, ids):
    engine.reserve(1, 20)
    first = engine.join(0, ids)
    np.testing.assert_array_equal(first, engine.join(0, [5, 6]))
    assert engine.generate_ids(ids, 2) == engine.generate_ids([5, 6], 2)


@pytest.mark.parametrize("slot", [-1, 2, 0.0, True, None, "0", [0]])
def test_only_a_slot_that_exists_is_one(engine, slot):
    engine.reserve(2, 20)
    for call in (lambda: engine.join(slot, [5]), lambda: engine.leave(slot)):
        with pytest.raises(RequestError, match=r"slot is .*; expected an integer, 0 to 1"):
            call()
    assert engine.lengths.tolist() == [0, 0]


def test_no_slots_yet(engine):
    with pytest.raises(RequestError, match="there are no slots yet, reserve makes them"):
        engine.join(0, [5])


@pytest.mark.parametrize("lengths", [[1.0], [True], "1", None, [2], [-1], [1, 1]], ids=named)
def test_only_integers_are_lengths(engine, lengths):
    if lengths is None:
        engine.prefill([[5]], lengths)  # all of them
        return
    with pytest.raises(RequestError, match="lengths"):
        engine.prefill([[5]], lengths)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "repetition_penalty", "seed"])
@pytest.mark.parametrize("value", ["1", b"1", True, [1], {1}, float("nan"), float("inf"), -1, object()], ids=named)
def test_only_numbers_sample(name, value):
    with pytest.raises(RequestError, match=f"^{name} is .*; expected"):
        Sampling(**{name: value})
    if name != "seed":
        with pytest.raises(RequestError, match=f"{name} is None"):
            Sampling(**{name: None})


def test_a_closed_engine_says_so():
    with load(SMALL, "cpu") as engine:
        assert isinstance(engine, Engine)
        stream = engine.stream_ids([5, 6], 4)
        next(stream)
    for call in (
        lambda: engine.prefill([[5]]),
        lambda: engine.reserve(1, 4),
        lambda: engine.generate_ids([5]),
        lambda: engine.generate("a"),
    ):
        with pytest.raises(RequestError, match="this engine is closed; load the artifact again"):
            call()
    with pytest.raises(RequestError):
        next(stream)
    engine.close()
    assert engine.session.memory == []


def test_text_to_ids_and_back(engine):
    ids = engine.encode("Grüße, 世界")
    assert engine.decode_ids(ids) == "Grüße, 世界"
    assert engine.decode_ids([]) == ""
    for text in (None, 5, ["a"]):
        with pytest.raises(RequestError, match="expected a text"):
            engine.encode(text)
