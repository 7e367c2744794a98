"""Selection by blocks equals attention under a mask over all keys: outputs and gradients, ties included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_models.layers.attention import attend_packed, drop_smallest, keep_largest, pack_keys
from wm_models.layers.selection import attend_blocks

SIZE = 8
SCALE = SIZE**-0.5


def attend_all(query, key, value, bias, keep, real, documents):
    """The same by a mask (B, H, S, S)."""
    length, heads = query.shape[2:0:-1]
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(query.shape[0], 1, -1, -1)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None])
    if real is not None:
        visible = visible & real[:, :, None]
    mask = keep_largest(bias.detach()[:, :, None], visible, keep) > torch.finfo(bias.dtype).min
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    if real is not None:  # no row without a key, whose softmax has no value
        mask = mask | (torch.eye(length, dtype=torch.bool) & ~real[..., None])
    return attend_packed(query, *pack_keys(key, value, bias), SCALE, mask)


def draw_inputs(seed, batch, heads, groups, length, per_query_head, biases, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads * groups, length, SIZE), (batch, heads, length, SIZE), (batch, heads, length, SIZE)]
    vectors = [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]
    shape = (batch, heads * groups if per_query_head else heads, length)
    bias = {
        "random": torch.rand(shape, generator=draw, dtype=dtype) * 3,
        "equal": torch.ones(shape, dtype=dtype),  # A = 0, as training starts
        "few": torch.randint(1, 4, shape, generator=draw).to(dtype),
    }[biases]
    return [part.requires_grad_() for part in (*vectors, bias)], draw


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(2, 90),
    keep=st.integers(1, 89),
    block=st.integers(1, 64),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_query_head=st.booleans(),
    biases=st.sampled_from(["random", "equal", "few"]),
    rows=st.sampled_from(["whole", "padded left", "padded right", "documents"]),
)
def test_blocks_equal_the_mask(seed, length, keep, block, heads, groups, per_query_head, biases, rows):
    keep = min(keep, length - 1)
    inputs, draw = draw_inputs(seed, 2, heads, groups, length, per_query_head, biases)
    real = documents = None
    if rows == "documents":
        documents = (torch.rand(2, length, generator=draw) < 0.1).cumsum(-1)
    elif rows != "whole":
        real = torch.ones(2, 1, length, dtype=torch.bool)
        real[0, :, : length // 3] = False
        real = real.flip(-1) if rows == "padded right" else real
    counts = torch.ones(()) if real is None else real[..., None]
    expected = attend_all(*inputs, keep, real, documents) * counts
    numbers = documents if real is None else real[:, 0].long() - 1
    found = attend_blocks(*inputs, SCALE, keep, block, numbers) * counts
    slope = torch.randn(expected.shape, generator=draw, dtype=expected.dtype)
    slopes = [torch.autograd.grad(y, inputs, slope) for y in (expected, found)]
    for one, other in zip((expected, *slopes[0]), (found, *slopes[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("biases", ["random", "equal", "few"])
def test_float32_against_float64(biases):
    inputs, _ = draw_inputs(0, 1, 2, 2, 600, False, biases)
    narrow = [part.detach().float().requires_grad_() for part in inputs]
    exact = attend_all(*inputs, 64, None, None)
    found = attend_blocks(*narrow, SCALE, 64, 32)
    slopes = torch.autograd.grad(exact.square().sum(), inputs), torch.autograd.grad(found.square().sum(), narrow)
    for one, other in zip((exact, *slopes[0]), (found, *slopes[1]), strict=True):
        assert (one - other.double()).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("biases", ["random", "equal", "few"])
def test_bfloat16_errs_no_more_than_the_mask(biases):
    """Both from the same bfloat16 numbers; the judge computes from them in float64."""
    inputs, _ = draw_inputs(0, 1, 2, 2, 300, False, biases)
    narrow = [part.detach().bfloat16().requires_grad_() for part in inputs]
    exact = [part.detach().double().requires_grad_() for part in narrow]
    masked, blocks = attend_all(*narrow, 64, None, None), attend_blocks(*narrow, SCALE, 64, 32)
    judge = attend_all(*exact, 64, None, None)
    results = []
    for y, sources in ((judge, exact), (masked, narrow), (blocks, narrow)):
        results.append([y, *torch.autograd.grad(y, sources, judge.detach().to(y.dtype))])
    for right, one, other in zip(*results, strict=True):
        error, allowed = ((part.double() - right).norm() for part in (other, one))
        assert error <= 1.25 * allowed, (error, allowed)


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from conftest import SMALL, randomise
from wm_models import DogeConfig, DogeForCausalLM

def gradients(model, ids):
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [part.full_tensor() if isinstance(part, DTensor) else part for part in found]

def build():
    model = DogeForCausalLM(DogeConfig(**{**SMALL, "num_hidden_layers": 2, "keep_window_size": 8})).double()
    randomise(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()

dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(0, SMALL["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
expected = gradients(build(), ids)
sharded = build()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
for model in (DistributedDataParallel(build()), sharded):
    for found, right in zip(gradients(model, ids[rank : rank + 1]), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)  # the loss is float32
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """DDP and FSDP2, with checkpointed layers: a row in each process has the gradients of both rows in one."""
    program = tmp_path / "program.py"
    program.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_one_graph_and_no_recompilation():
    """Of one shape, whatever the data: documents move, biases change."""
    compiled = torch.compile(attend_blocks, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            inputs, draw = draw_inputs(seed, 1, 1, 2, 100, False, "random", torch.float32)
            documents = (torch.rand(1, 100, generator=draw) < 0.1).cumsum(-1)
            found = compiled(*inputs, SCALE, 16, 32, documents)
            found.sum().backward()
            expected = attend_all(*(part.detach() for part in inputs), 16, None, documents)
            torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


def test_blocks_are_not_enough_for_a_sliding_window():
    """A key that query 2 leaves out is kept by query 3, whose window has lost the largest one."""
    bias = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)[None, None, None]
    places = torch.arange(4)
    visible = (places <= places[:, None]) & (places > places[:, None] - 3)
    kept = keep_largest(bias, visible[None, None], 2)[0, 0] > torch.finfo(bias.dtype).min
    assert kept[2:].tolist() == [[True, False, True, False], [False, True, True, False]]


def test_blocks_are_not_enough_for_a_dropped_share():
    """Query 0 sees only a dropped key, so it attends to it and to the later keys that stay, as those models do."""
    bias = torch.tensor([0.5, 3.0, 2.0, 1.0], dtype=torch.float64)[None, None, None]
    visible = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    mask = drop_smallest(bias, visible, torch.tensor([4]), 0.75, bias.dtype)[0, 0]  # keys 0 and 3 go
    assert mask.softmax(-1)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
