"""Beyond the keep window a sequence of repeated tokens has one answer, however it is computed.

Equal tokens have equal biases in the first layer, so the selection meets ties all the time: as in text.
"""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, baseline, ours, randomise
from test_export.conftest import lowered
from transformers import DynamicCache, PreTrainedTokenizerFast

from export.verification.cases import Case
from export.verification.comparison import NARROW_KL_LIMIT, Comparison, compare, kl_limit
from runtime import load
from runtime.artifact.manifest import Artifact
from wm_models import DogeConfig, DogeForCausalLM, shipped_checkpoint
from wm_models.layers.selection import attend_blocks

TIMES = 16  # keep windows in the longest sequence
# of the standard library's argparse; every version of it must give the same ids
SOURCE = """
    def add_argument(self, *args, **kwargs):
        if not args or len(args) == 1 and args[0][0] not in chars:
            if args and 'dest' in kwargs:
"""


def small(keep: int, seed: int = 0, **changes: object) -> DogeForCausalLM:
    model = DogeForCausalLM(DogeConfig(**{**SMALL, "keep_window_size": keep, "eos_token_id": None, **changes})).eval()
    randomise(model, seed)
    return model


def zipf(length: int, seed: int = 0) -> torch.Tensor:
    """(1, length): the n-th commonest token is n times as rare as the commonest.

    The first two differ. Of a run at the very beginning every query sees one value only, so that its keys are equal up
    to rounding in later layers too; which of those is kept may turn on the last bit.
    """
    shares = 1 / np.arange(1, SMALL["vocab_size"] + 1)
    draw = np.random.default_rng(seed).choice(SMALL["vocab_size"], (1, length), p=shares / shares.sum())
    draw[0, 1] = (draw[0, 0] + 1) % SMALL["vocab_size"]
    return torch.from_numpy(draw)


def pieces(length: int, first: int) -> list[int]:
    """`length` tokens as a prompt of `first`, 20 single steps, and pieces of 13."""
    done = first + 20
    return [first, *[1] * 20, *[min(13, length - at) for at in range(done, length, 13)]]


def in_pieces(model: DogeForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits (S, V) of one sequence by transformers' cache, in pieces of these sizes."""
    cache, done, found = DynamicCache(config=model.config), 0, []
    for size in sizes:
        found.append(model(ids[:, done : done + size], cache=cache, use_cache=True).logits[0])
        done += size
    return torch.cat(found)


def by_steps(model: DogeForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The same by `step` over static caches."""
    caches, held, found = model.new_caches(1, ids.shape[1]), torch.zeros(1, dtype=torch.long), []
    for size in sizes:
        piece = ids[:, int(held) : int(held) + size]
        logits, caches = model.step(piece, held, torch.tensor([size]), caches, all_logits=True)
        found.append(logits[0])
        held = held + size
    return torch.cat(found)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize(("keep", "times"), [(24, 2), (24, TIMES), (8, TIMES)])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True}, {"num_bias_heads": 4}, {"sliding_window": 40}], ids=str
)
def test_any_pieces_are_the_full_pass(keep, times, changes):
    model = small(keep, **changes)
    ids = zipf(times * keep)
    full = model(ids).logits[0]
    for first in (1, keep - 1, times * keep // 2 - 3):
        sizes = pieces(times * keep, first)
        assert_same(in_pieces(model, ids, sizes), full)
        assert_same(by_steps(model, ids, sizes), full)


@torch.no_grad()
def test_training_form_and_gradients_are_those_of_the_plain_product():
    """The product of two weights and the two products, one after the other, differ by rounding alone."""
    model, plain = small(24).double(), small(24).double()
    for layer in plain.model.layers:
        layer.self_attn.selects = False
    ids = zipf(100)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-10)
    with torch.enable_grad():
        for each in (model, plain):
            each(ids, labels=ids).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)


@torch.no_grad()
def test_distinct_tokens_are_transformers():
    """As ever: where biases differ, the keys kept are those that transformers' top-k names."""
    theirs = baseline(keep_window_size=24)
    ids = torch.randperm(SMALL["vocab_size"], generator=torch.Generator().manual_seed(3))[None, :150]
    expected = theirs(ids).logits
    assert (ours(theirs)(ids).logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def engine_logits(path: Path, ids: torch.Tensor, first: int) -> np.ndarray:
    """(S - first + 1, V): a prompt of `first` tokens, then steps."""
    engine = load(path, threads=1)
    found = [engine.prefill(ids[:, :first].numpy())]
    found += [engine.decode([token]) for token in ids[0, first:].tolist()]
    return np.concatenate(found)


@torch.no_grad()
@pytest.mark.parametrize(("keep", "spare"), [(16, 12), (40, 600)], ids=["rows are evicted", "every row stays"])
def test_the_engine_is_the_full_pass(keep, spare, tmp_path):
    model, length = small(keep), TIMES * 16
    ids = zipf(length)
    expected = model(ids).logits[0].numpy()
    path = lowered(tmp_path / "artifact", model, max_batch=1, max_length=length, spare=spare).path
    for first in (1, 37, 100):
        found = engine_logits(path, ids, first)
        np.testing.assert_allclose(found, expected[first - 1 :], rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.fixture(scope="module")
def source_text() -> torch.Tensor:
    """(1, 1024) ids of the standard library's own source."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped_checkpoint())
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return ids[:, 1000:2024]


def shipped(keep: int) -> DogeForCausalLM:
    return DogeForCausalLM.from_pretrained(shipped_checkpoint(), keep_window_size=keep, dtype=torch.float32).eval()


@torch.no_grad()
def test_float16_keeps_what_float32_keeps(source_text, tmp_path):
    """Most biases of the shipped model are near 1: rounded to float16 many are equal, and others would be kept.

    With biases in float16 the mean KL is 0.7. bfloat16's inputs alone differ enough to order near biases otherwise.
    """
    exact, model = shipped(256)(source_text).logits[0], shipped(256).half()
    full = model(source_text).logits[0].float()
    assert divergence(full, exact, NARROW_KL_LIMIT).passed
    sizes = [300, *[1] * 20, 704]
    for found in (in_pieces(model, source_text, sizes), by_steps(model, source_text, sizes)):
        assert divergence(found.float(), exact, NARROW_KL_LIMIT).passed
    path = lowered(tmp_path / "artifact", shipped(256), max_batch=1, max_length=1024, spare=64, dtype="fp16").path
    assert divergence(engine_logits(path, source_text[:, :800], 700), exact[:800], NARROW_KL_LIMIT).passed


@torch.no_grad()
def test_source_text(source_text, tmp_path):
    """The shipped model with a window of 64 on real text of sixteen windows: cached, stepped and exported."""
    model = shipped(64)
    full = model(source_text).logits[0]
    assert_same(in_pieces(model, source_text, [37, *pieces(987, 400)]), full)
    path = lowered(tmp_path / "artifact", model, max_batch=1, max_length=1024, spare=64).path
    assert_same(torch.from_numpy(engine_logits(path, source_text, 300)), full[299:])


def decisive() -> DogeForCausalLM:
    """A model that keeps 8 keys, the same ones in every type, of texts of 8 distinct tokens.

    Rounding changes which of two near biases is the larger, and so which keys are kept. In one layer, and with this
    seed, the biases of distinct tokens are 2 % or more apart. Those of equal tokens tie all the time.
    """
    return small(8, seed=78, num_hidden_layers=1)


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    """(1, 128) ids below 8 each, 16 keep windows: drawn by Zipf's law, and from the characters of source text."""
    return {"Zipf": zipf(128) % 8, "source": torch.tensor([list(map(ord, SOURCE[:128]))]) % 8}


def divergence(found: torch.Tensor | np.ndarray, expected: torch.Tensor, limit: float | None) -> Comparison:
    """The verdict of an export's verification on the logits (S, V) of the last S positions."""
    rows = [np.asarray(each, np.float32) for each in (expected[len(expected) - len(found) :], found)]
    return compare(Case("", (1,), 1, (0,)), rows[:1], rows[1:], limit)


@pytest.fixture(scope="module", params=[{"dtype": "bf16"}, {"scheme": "int8"}], ids=["bf16", "int8"])
def narrow(request, tmp_path_factory) -> Artifact:
    path = tmp_path_factory.mktemp("narrow") / "artifact"
    return lowered(path, decisive(), max_batch=1, max_length=128, spare=12, **request.param)


@torch.no_grad()
def test_a_narrow_engine_is_the_full_pass(narrow, texts, monkeypatch):
    """Rows are evicted, by prompt and steps. Were the earlier of equal keys kept, the limit would be passed."""
    limit = kl_limit(narrow.graph)
    exact = {name: decisive()(ids).logits[0] for name, ids in texts.items()}
    for name, ids in texts.items():
        for first in (1, 37, 100):
            verdict = divergence(engine_logits(narrow.path, ids, first), exact[name], limit)
            assert verdict.passed, (name, first, verdict)

    def earlier_first(query, key, value, bias, *rest):
        return attend_blocks(query, key, value, bias * (1 - 1e-6 * torch.arange(bias.shape[-1])), *rest)

    monkeypatch.setattr("wm_models.context.attend_blocks", earlier_first)
    for name, ids in texts.items():
        assert not divergence(decisive()(ids).logits[0], exact[name], limit).passed, name


@torch.no_grad()
def test_bfloat16_in_any_pieces_is_the_full_pass(texts):
    """The eager model in bfloat16, against itself and against float32."""
    exact, model = decisive(), decisive().bfloat16()
    for ids in texts.values():
        full, expected = model(ids).logits[0].float(), exact(ids).logits[0]
        assert divergence(full, expected, NARROW_KL_LIMIT).passed
        for first in (1, 37, 100):
            sizes = pieces(128, first)
            for found in (in_pieces(model, ids, sizes).float(), by_steps(model, ids, sizes).float()):
                assert divergence(found, full, NARROW_KL_LIMIT).passed
                assert divergence(found, expected, NARROW_KL_LIMIT).passed
