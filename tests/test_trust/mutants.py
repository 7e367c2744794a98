"""Graphs that are wrong in one place: the verification has to find every one of them.

    PYTHONPATH=tests python -m test_trust.mutants        prints the table of what was caught, and by which comparison

Each is made of a sound artifact's graph, with a manifest that agrees with it.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from export import Comparison, OnnxOptions, export_onnx, verify
from test_trust.samples import make_checkpoint, rewrite

KEEP = 24
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "keep_window_size": KEEP}


class Mutable:
    """A graph under the knife."""

    def __init__(self, path: Path):
        self.model = onnx.load(path, load_external_data=False)
        self.graph = self.model.graph

    def nodes(self, kind: str) -> list[onnx.NodeProto]:
        found = [node for node in self.graph.node if node.op_type == kind]
        assert found, f"the graph has no {kind}"
        return found

    def constant(self, value: np.ndarray) -> str:
        name = f"mutant.{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def initializer(self, end: str) -> onnx.TensorProto:
        return next(tensor for tensor in self.graph.initializer if tensor.name.endswith(end))

    def put_after(self, node: onnx.NodeProto, kind: str, *more: str, **attributes: object) -> None:
        """One more operation on a node's first output, before anything reads it."""
        name = node.output[0]
        node.output[0] = f"{name}.sound"
        extra = helper.make_node(kind, [node.output[0], *more], [name], **attributes)
        self.graph.node.insert(list(self.graph.node).index(node) + 1, extra)

    def put_before(self, node: onnx.NodeProto, index: int, kind: str, *more: str, **attributes: object) -> None:
        """One more operation on what a node reads."""
        name = f"mutant.input.{len(self.graph.node)}"
        extra = helper.make_node(kind, [node.input[index], *more], [name], **attributes)
        node.input[index] = name
        self.graph.node.insert(list(self.graph.node).index(node), extra)

    def reorder_heads(self, node: onnx.NodeProto, index: int) -> None:
        """Heads 0 1 2 3 as 0 2 1 3: what repeating two rows as 0 1 0 1 in place of 0 0 1 1 comes to."""
        self.put_before(node, index, "Gather", self.constant(np.array([0, 2, 1, 3])), axis=1)


def wrong_rope_base(m: Mutable) -> None:
    tensor = m.initializer("frequencies")
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values ** np.float32(1.02)).astype(np.float32), tensor.name))


def rotation_backwards(m: Mutable) -> None:
    m.put_after(m.nodes("Sin")[0], "Neg")


def keys_not_rotated(m: Mutable) -> None:
    node = m.nodes("RotaryEmbedding")[-1]  # of the last layer
    source, name = node.input[0], node.output[0]
    node.CopyFrom(helper.make_node("Identity", [source], [name]))


def bias_dropped(m: Mutable) -> None:
    for node in m.nodes("Pow"):
        m.put_after(node, "Mul", m.constant(np.float64(0.0)))


def bias_dropped_in_one_layer(m: Mutable) -> None:
    m.put_after(m.nodes("Pow")[-1], "Mul", m.constant(np.float64(0.0)))


def bias_without_softplus(m: Mutable) -> None:
    """(1 + exp(dt)) ** A without the 1 is exp(A · dt)."""
    for node in m.nodes("Pow"):
        node.input[0] = next(add for add in m.nodes("Add") if add.output[0] == node.input[0]).input[0]


def _visible(m: Mutable) -> onnx.NodeProto:
    return m.nodes("LessOrEqual")[0]


def mask_one_too_many(m: Mutable) -> None:
    m.put_before(_visible(m), 1, "Add", m.constant(np.int64(1)))


def mask_one_too_few(m: Mutable) -> None:
    _visible(m).op_type = "Less"


def _write_late(m: Mutable, end: str) -> None:
    one = m.constant(np.int64(1))
    for node in m.nodes("TensorScatter"):
        if node.output[0].endswith(end):
            m.put_before(node, 2, "Add", one)


def caches_written_late(m: Mutable) -> None:
    _write_late(m, ".out")


def keys_written_late(m: Mutable) -> None:
    _write_late(m, "key.out")


def biases_written_late(m: Mutable) -> None:
    _write_late(m, "bias.out")


def values_read_before_they_are_written(m: Mutable) -> None:
    node = m.nodes("Attention")[0]
    node.input[2] = node.input[2].removesuffix(".out")


def _weight_inputs(m: Mutable) -> list[onnx.NodeProto]:
    names = {tensor.name for tensor in m.graph.initializer}
    return [node for node in m.nodes("MatMul") if node.input[1] in names]


def weights_of_two_layers_swapped(m: Mutable) -> None:
    nodes = _weight_inputs(m)
    layer = len(nodes) // 2  # of two layers
    nodes[1].input[1], nodes[1 + layer].input[1] = nodes[1 + layer].input[1], nodes[1].input[1]


def norms_of_two_layers_swapped(m: Mutable) -> None:
    first, second = (m.initializer(f"layers.{layer}.input_layernorm.weight") for layer in (0, 1))
    first.name, second.name = second.name, first.name


def query_heads_on_the_wrong_keys(m: Mutable) -> None:
    for node in m.nodes("Attention"):
        m.reorder_heads(node, 0)
        m.put_after(node, "Gather", m.constant(np.array([0, 2, 1, 3])), axis=1)


def bias_heads_repeated_wrongly(m: Mutable) -> None:
    for node in m.nodes("Attention"):
        m.reorder_heads(node, 3)


def _change_number(m: Mutable, old: int, new: int) -> None:
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    found = [
        tensor
        for tensor in m.graph.initializer
        if tensor.data_type in integers and numpy_helper.to_array(tensor).tolist() in (old, [old])
    ]
    assert found, f"the graph has no constant {old}"
    for tensor in found:
        value = np.full_like(numpy_helper.to_array(tensor), new)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def selection_keeps_one_more(m: Mutable) -> None:
    _change_number(m, KEEP, KEEP + 1)


def selection_keeps_one_less(m: Mutable) -> None:
    _change_number(m, KEEP, KEEP - 1)


def selection_keeps_the_earliest_of_equals(m: Mutable) -> None:
    """Ties are counted from the end, so the later of them are left out."""
    for node in m.nodes("CumSum"):
        next(attribute for attribute in node.attribute if attribute.name == "reverse").i = 1


def scale_of_another_head_size(m: Mutable) -> None:
    for node in m.nodes("Attention"):
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= 1.01


def slots_take_the_first_slot_s_length(m: Mutable) -> None:
    name = m.graph.input[1].name
    node = helper.make_node("Gather", [name, m.constant(np.zeros(1, np.int64))], ["mutant.length"], axis=0)
    for other in m.graph.node:
        for index, source in enumerate(other.input):
            if source == name:
                other.input[index] = "mutant.length"
    shape = helper.make_node("Shape", [name], ["mutant.shape"])
    spread = helper.make_node("Expand", ["mutant.first", "mutant.shape"], ["mutant.length"])
    node.output[0] = "mutant.first"
    for extra in (spread, shape, node):
        m.graph.node.insert(0, extra)


def logits_of_the_token_before_the_last(m: Mutable) -> None:
    name = "logits_index"
    node = next(node for node in m.graph.node if name in node.input)
    m.put_before(node, list(node.input).index(name), "Sub", m.constant(np.int64(1)))


def gate_without_its_factor(m: Mutable) -> None:
    sigmoid = m.nodes("Sigmoid")[-1]
    product = next(node for node in m.graph.node if sigmoid.output[0] in node.input)
    for index in range(2):
        product.input[index] = sigmoid.output[0]


def epsilon_of_another_norm(m: Mutable) -> None:
    for node in m.nodes("RMSNormalization"):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-3


def residual_dropped(m: Mutable) -> None:
    node = m.nodes("Add")[-1]
    node.input[0] = node.input[1]


def cache_scales_of_two_layers_swapped(m: Mutable) -> None:
    """In DequantizeLinear alone: swapped in both operators they are another, coarser rounding."""
    first, last = (node for node in m.nodes("DequantizeLinear") if ".value" in node.name)
    first.input[1], last.input[1] = last.input[1], first.input[1]


def cache_scales_of_two_heads_swapped(m: Mutable) -> None:
    node = m.nodes("DequantizeLinear")[-1]
    tensor = m.initializer(node.input[1])
    node.input[1] = m.constant(numpy_helper.to_array(tensor)[::-1].copy())


def cache_scales_too_small(m: Mutable) -> None:
    """By four in both operators: what is beyond a quarter of the largest is cut off."""
    for tensor in [tensor for tensor in m.graph.initializer if tensor.name.endswith(".scale")]:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float32(4), tensor.name))


# Of a graph whose keys and values are int8.
CACHE_MUTANTS: list[Callable[[Mutable], None]] = [
    cache_scales_of_two_layers_swapped,
    cache_scales_of_two_heads_swapped,
    cache_scales_too_small,
]

MUTANTS: list[Callable[[Mutable], None]] = [
    wrong_rope_base,
    rotation_backwards,
    keys_not_rotated,
    bias_dropped,
    bias_dropped_in_one_layer,
    bias_without_softplus,
    mask_one_too_many,
    mask_one_too_few,
    caches_written_late,
    keys_written_late,
    biases_written_late,
    values_read_before_they_are_written,
    weights_of_two_layers_swapped,
    norms_of_two_layers_swapped,
    query_heads_on_the_wrong_keys,
    bias_heads_repeated_wrongly,
    selection_keeps_one_more,
    selection_keeps_one_less,
    selection_keeps_the_earliest_of_equals,
    scale_of_another_head_size,
    slots_take_the_first_slot_s_length,
    logits_of_the_token_before_the_last,
    gate_without_its_factor,
    epsilon_of_another_norm,
    residual_dropped,
]

# As training starts all norms are ones: swapped, they are the same graph.
SAME_WHEN_FRESH = {norms_of_two_layers_swapped}


def judge(artifact: Path, mutate: Callable[[Mutable], None], place: Path) -> list[Comparison]:
    """The verdicts of `wm-export verify` on the mutant, made in the new directory `place`."""
    shutil.copytree(artifact, place)
    mutable = Mutable(place / "model.onnx")
    mutate(mutable)
    (place / "model.onnx").write_bytes(mutable.model.SerializeToString())
    rewrite(place)
    return verify(place)


def make_sound(root: Path, fresh: bool, kv_cache_dtype: str | None = None) -> Path:
    """An artifact that selects keys: of a randomised checkpoint, or of one as training starts, with A = 0."""
    source = make_checkpoint(root / "checkpoint", fresh, **SIZES)
    options = OnnxOptions(max_length=120, max_batch=3, kv_cache_dtype=kv_cache_dtype)
    verdicts = export_onnx(source, root / "artifact", options)
    assert all(verdict.passed for verdict in verdicts)
    return root / "artifact"


def main() -> None:
    table = Table("mutant", "trained", "as training starts, A = 0", title="What the verification caught")
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sound = [make_sound(root / str(fresh), fresh) for fresh in (False, True)]
        for mutate in MUTANTS:
            cells = []
            for index, artifact in enumerate(sound):
                if index and mutate in SAME_WHEN_FRESH:
                    cells.append("the same graph")
                    continue
                verdicts = judge(artifact, mutate, root / f"{mutate.__name__}.{index}")
                failed = [verdict for verdict in verdicts if not verdict.passed]
                missed += not failed
                cells.append(f"caught by {len(failed)} of {len(verdicts)}" if failed else "MISSED")
            table.add_row(mutate.__name__.replace("_", " "), *cells)
    Console(width=110).print(table)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
