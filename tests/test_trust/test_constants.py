"""Graphs that would occupy the machine while they load: refused before anything computes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.artifact.onnx_reader import OnnxFormatError, read_onnx, relocated
from runtime.artifact.protobuf import MOST

VECTOR = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])


def graph(nodes, initializers=()):
    made = helper.make_graph(nodes, "g", [VECTOR], [helper.make_tensor_value_info("y", 1, None)], list(initializers))
    made.output[0].type.tensor_type.shape.dim.add(dim_param="n")
    return helper.make_model(made).SerializeToString()


def products():
    """Each of 40 products of 6000 by 6000 numbers takes seconds, and their results gigabytes."""
    weight = numpy_helper.from_array(np.zeros((100, 100), np.float32), "w0")
    return [helper.make_node("MatMul", [f"w{i}", "w0"], [f"w{i + 1}"]) for i in range(40)], [weight]


def fill(size):
    shape = numpy_helper.from_array(np.array([size]), "shape")
    return [helper.make_node("ConstantOfShape", ["shape"], ["filled"])], [shape]


def converted(times):
    weight = numpy_helper.from_array(np.zeros(1 << 21, np.int8), "c0")
    return [helper.make_node("Cast", [f"c{i}"], [f"c{i + 1}"], to=1) for i in range(times)], [weight]


def spread(size):
    """A column and a row, which broadcast to a matrix."""
    parts = [
        numpy_helper.from_array(np.zeros(shape, np.float32), name) for shape, name in (((size, 1), "a"), ((size,), "b"))
    ]
    return [helper.make_node("Add", ["a", "b"], ["matrix"])], parts


def ranged():
    numbers = [numpy_helper.from_array(np.array(value), name) for value, name in ((0, "a"), (1 << 40, "b"), (1, "c"))]
    return [helper.make_node("Range", ["a", "b", "c"], ["r"])], numbers


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (products(), "'MatMul' computes with constants alone"),
        (fill(1 << 40), "makes 1099511627776 elements of constants"),
        (converted(200), "'Cast' makes 2097152 elements of constants"),
        (spread(1 << 14), "'Add' makes 268435456 elements of constants"),
        (ranged(), "'Range' computes with constants alone"),
        (([helper.make_node("Exp", ["z"], ["y"]), helper.make_node("Exp", ["x"], ["z"])], []), "'Exp' reads 'z'"),
    ],
)  # fmt: skip
def test_work_on_constants_is_refused(made, words):
    with pytest.raises(OnnxFormatError, match=words):
        read_onnx(graph(*made))


def test_work_in_a_branch_is_refused():
    nodes, initializers = products()
    result = helper.make_tensor_value_info("w40", 1, None)
    branch = helper.make_graph(nodes, "then", [], [result], initializers)
    model = graph([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)])
    with pytest.raises(OnnxFormatError, match="'MatMul' computes with constants alone"):
        read_onnx(model)


@pytest.mark.parametrize("made", [fill(100), converted(10), spread(10), ([], [])])
def test_a_little_is_not(made):
    assert len(read_onnx(graph(*made)).nodes) == len(made[0])


def test_counts_are_bounded_before_anything_is_built():
    node = helper.make_node("Exp", ["x"], ["x"]).SerializeToString()
    field = b"\x0a" + bytes([len(node)]) + node
    body = field * (MOST["node"] + 1)
    model = onnx.ModelProto(ir_version=8).SerializeToString() + b"\x3a" + tagged(body)
    with pytest.raises(OnnxFormatError, match=f"its graph has more than {MOST['node']} of node"):
        read_onnx(model)


def varint(value):
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def tagged(content):
    """A message's length and content, as they follow its number."""
    return varint(len(content)) + content


def test_packed_dimensions_are_counted_before_they_are_read(monkeypatch):
    packed = b"\x0a" + varint(1_000_000) + b"\x01" * 1_000_000
    inner = b"\x2a" + tagged(packed + TensorProto(name="w", data_type=1, raw_data=b"1234").SerializeToString())
    monkeypatch.setattr("runtime.artifact.onnx_reader.numbers", lambda *_: pytest.fail("they were read"))
    with pytest.raises(OnnxFormatError, match="'w' has more than 8 dimensions"):
        read_onnx(b"\x3a" + tagged(inner))


def test_places_of_tensors_can_be_replaced(artifact):
    """Also where a length is written in more bytes than it needs, which is valid protobuf."""
    data = (artifact / "model.onnx").read_bytes()
    model = onnx.load_from_string(data)
    for place in ("w", "a/much/longer/place" * 20):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        assert onnx.load_from_string(relocated(data, lambda name, place=place: place)) == model
    entry = onnx.StringStringEntryProto(key="location", value="weights").SerializeToString()
    length = bytes([len(entry) | 0x80, 0x80, 0])
    body = TensorProto(name="w", data_type=1, dims=[1], data_location=1).SerializeToString() + b"\x6a" + length + entry
    whole = graph([], []) + b""
    loose = onnx.load_from_string(whole)
    inner = loose.graph.SerializeToString() + b"\x2a" + varint(len(body)) + body
    loose.ClearField("graph")
    found = onnx.load_from_string(
        relocated(loose.SerializeToString() + b"\x3a" + varint(len(inner)) + inner, str.upper)
    )
    assert found.graph.initializer[0].external_data[0].value == "WEIGHTS"
