"""The cost of a decode step, counted in graphs, beside the weights' own bytes and torch's count of operations."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import SMALL
from onnx import TensorProto
from rich.console import Console
from torch.utils.flop_counter import sdpa_flop_count
from typer.testing import CliRunner

from export.bench.cards import CARDS, find_card
from export.bench.cost import PRECISIONS, graph_parts, own_precision, step_costs
from export.bench.roofline import SHARE, roofline
from export.cli import make_app
from runtime.artifact.integrity import read_artifact
from runtime.errors import RequestError

WIDTHS = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.INT8: 1,
    TensorProto.INT4: 0.5,
}


def weight_bytes(artifact):
    """Of each initializer in the file, by its name, but those of one number. A float is as wide as the model's."""
    graph = onnx.load(artifact.path / artifact.graph.file, load_external_data=False).graph
    sizes = {each.name: (int(np.prod(each.dims)), WIDTHS.get(each.data_type)) for each in graph.initializer}
    most = own_precision(artifact).width
    return {name: count * min(width, most) for name, (count, width) in sizes.items() if width and count > 1}


def costs(artifact, precision=None, batch=1, context=64):
    return step_costs(artifact, graph_parts(artifact), precision or own_precision(artifact), batch, context)


def total(found, part):
    return sum(getattr(cost, part) for cost in found)


@pytest.mark.parametrize("name", ["dense", "biased, untied", "experts", "hybrid", "fp16", "int8", "int4", "classifier"])
def test_weights_are_those_in_the_file(exported, name):
    """Each once; of a table that is looked up in, the rows that a token needs."""
    artifact = read_artifact(exported(name)[1])
    config, sizes = artifact.read_json("config.json"), weight_bytes(artifact)
    expected = sum(sizes.values())
    tables = {key: size for key, size in sizes.items() if "embed" in key}
    table = sum(size for key, size in sizes.items() if key.startswith(("embed_tokens", "lm_head")))
    if name in ("biased, untied", "classifier"):
        table = sum(size for key, size in tables.items() if "embed_tokens" in key)
        expected -= table
    expected += table / config["vocab_size"]
    if config.get("is_moe"):
        chosen = config["num_experts_per_tok"] / config["num_experts"]
        expected -= (1 - chosen) * sum(size for key, size in tables.items() if "down_embed" in key or "up_embed" in key)
    assert total(costs(artifact), "weights") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "int4"])
def test_a_precision_costs_what_an_export_with_it_does(exported, name):
    """Of the same model: counted in the float32 graph, and in the graph that has it."""
    dense, other = (read_artifact(exported(each)[1]) for each in ("dense", name))
    assert own_precision(other) is PRECISIONS[name]
    for part in ("weights", "caches", "operations"):
        expected = total(costs(other), part)
        assert total(costs(dense, PRECISIONS[name]), part) == pytest.approx(expected, rel=1e-3)  # constants in float32
        assert total(costs(other, PRECISIONS["fp32"]), part) == pytest.approx(total(costs(dense), part), rel=1e-3)


@pytest.mark.parametrize(("name", "layers"), [("dense", 3), ("hybrid", 1)])
def test_attention_is_what_torch_counts(exported, name, layers):
    """Of one query and every key, in each layer with attention; the model's window is as long as all of it."""
    artifact, context, heads = read_artifact(exported(name)[1]), 100, SMALL["num_attention_heads"]
    size = SMALL["hidden_size"] // heads
    keys = (1, heads, context, size)
    expected = layers * sdpa_flop_count((1, heads, 1, size), keys, keys)
    without = total(costs(artifact, context=1), "operations") - expected / context
    assert total(costs(artifact, context=context), "operations") == without + expected


def test_experts_are_multiplied_one_by_one(exported):
    """The chosen experts' two rows each with one token."""
    parts = graph_parts(read_artifact(exported("experts")[1]))
    assert [part.products for part in parts if part.products] == [2 * 2 * 5 * SMALL["hidden_size"]] * 3


def test_a_recurrence_costs_its_state_twice(exported):
    """It is read and written, whatever the context; each head's query is multiplied with it."""
    found = read_artifact(exported("hybrid")[1])
    size = SMALL["hidden_size"] ** 2 // SMALL["num_attention_heads"]
    for context in (1, 300):
        ssd = [cost for cost in costs(found, context=context) if cost.module.endswith(".ssd")]
        assert [cost.caches for cost in ssd] == [2 * 4 * size] * 2
    assert [part.products for part in graph_parts(found) if part.products] == [2 * size] * 2


def test_slots_share_weights_and_not_caches(exported):
    artifact = read_artifact(exported("dense")[1])
    one, many = costs(artifact), costs(artifact, batch=4)
    assert total(many, "caches") == 4 * total(one, "caches") > 0
    assert total(many, "operations") == 4 * total(one, "operations")
    row = SMALL["hidden_size"] * 4
    assert total(many, "weights") == total(one, "weights") + 3 * row
    assert total(costs(artifact, context=128), "caches") == 2 * total(one, "caches")


def test_a_window_is_read_no_further(exported):
    artifact = read_artifact(exported("window")[1])
    assert total(costs(artifact, context=300), "caches") == total(costs(artifact, context=200), "caches")


def test_experts_of_many_slots_are_at_most_the_table(exported):
    artifact = read_artifact(exported("experts")[1])
    one, two, many, more = (total(costs(artifact, batch=batch), "weights") for batch in (1, 2, 1000, 1001))
    table, row = 64 * SMALL["hidden_size"] * 4, SMALL["hidden_size"] * 4  # of the experts, and of an embedding
    assert two - one == row + 3 * 2 * 5 * table / 64  # in three layers two tables
    assert many == more == one + (SMALL["vocab_size"] - 1) * row + 3 * 2 * (64 - 5) * table / 64


def test_tokens_per_second(exported):
    """Bound by memory, and by operations where a card has few."""
    found = roofline(exported("dense")[1], batch=2, context=100)
    card, precision = CARDS[0], PRECISIONS["fp16"]
    step = found.costs["fp16"]
    read = sum(cost.total for cost in step)
    assert found.tokens_per_second(card, precision) == pytest.approx(2 * SHARE * card.bandwidth / read)
    slow = replace(card, float16=1e6)
    assert found.tokens_per_second(slow, precision) == pytest.approx(2 * 1e6 / total(step, "operations"), rel=0.05)
    assert found.tokens_per_second(slow, PRECISIONS["fp32"]) > 1e3  # float32 has a rate of its own


def test_a_card_is_found_by_its_whole_name():
    assert find_card("NVIDIA L4") is next(card for card in CARDS if card.name == "L4")
    assert find_card("NVIDIA L40S") is find_card("NVIDIA A100-SXM4-40GB") is None
    assert len({card.name for card in CARDS}) == len(CARDS) == 5


def test_the_command(exported, monkeypatch):
    directory = str(exported("int8")[1])
    monkeypatch.setattr("export.cli.console", Console(highlight=False, width=200))
    shown = CliRunner().invoke(make_app(), ["roofline", directory, "--context", "100"])
    assert shown.exit_code == 0
    for words in ("batch 1, context 100", "layers.*.self_attn", "lm_head", "of it caches", "RTX 4090"):
        assert words in shown.stdout
    told = CliRunner().invoke(make_app(), ["roofline", directory, "--batch", "3", "--json"])
    values = json.loads(told.stdout)
    assert (values["batch"], values["context"]) == (3, 512)
    assert values["tokens_per_second"].keys() == {card.name for card in CARDS}
    assert all(rate > 0 for rates in values["tokens_per_second"].values() for rate in rates.values())
    assert values["modules"].keys() == PRECISIONS.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "--batch is 0; expected 1 or more"),
        ({"context": 513}, "--context is 513; .*holds 1 to 512 tokens"),
    ],
)
def test_no_step_is_like_that(exported, options, words):
    with pytest.raises(RequestError, match=words):
        roofline(exported("dense")[1], **options)
