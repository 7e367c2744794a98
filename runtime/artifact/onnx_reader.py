"""What an ONNX file declares, read before ONNX Runtime sees it: its operators, its tensors, and where their bytes lie.

Everything known is in the tables below. Functions and training steps are refused, and subgraphs but for the branches
of an If, so no graph can loop.

The reader is our own because a protobuf library passes over just what a check must see, fields it does not know and
fields given twice, and because the runtime then needs neither `onnx` nor protobuf (38 ms and 12 MB to import). It is
slower, 8 ms where `onnx` takes 0.3 ms for a graph of 24 layers, once a load.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from math import prod

from runtime.artifact.constants import Node, check_constants
from runtime.artifact.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    LONGEST_NUMBER,
    MANY,
    MOST_DIMENSIONS,
    VARINT,
    Field,
    Fields,
    OnnxFormatError,
    Span,
    count,
    decoded,
    field,
    message,
    numbers,
    one,
    replaced,
    text,
)

# The fields of onnx.proto3 that a step graph may use, by number.
MODEL: dict[int, Field] = {
    1: ("ir_version", VARINT, not MANY),
    2: ("producer_name", BYTES, not MANY),
    3: ("producer_version", BYTES, not MANY),
    4: ("domain", BYTES, not MANY),
    5: ("model_version", VARINT, not MANY),
    6: ("doc_string", BYTES, not MANY),
    7: ("graph", BYTES, not MANY),
    8: ("opset_import", BYTES, MANY),
    14: ("metadata_props", BYTES, MANY),
}
GRAPH: dict[int, Field] = {
    1: ("node", BYTES, MANY),
    2: ("name", BYTES, not MANY),
    5: ("initializer", BYTES, MANY),
    10: ("doc_string", BYTES, not MANY),
    11: ("input", BYTES, MANY),
    12: ("output", BYTES, MANY),
    13: ("value_info", BYTES, MANY),
    16: ("metadata_props", BYTES, MANY),
}
NODE: dict[int, Field] = {
    1: ("input", BYTES, MANY),
    2: ("output", BYTES, MANY),
    3: ("name", BYTES, not MANY),
    4: ("op_type", BYTES, not MANY),
    5: ("attribute", BYTES, MANY),
    6: ("doc_string", BYTES, not MANY),
    7: ("domain", BYTES, not MANY),
    9: ("metadata_props", BYTES, MANY),
}
ATTRIBUTE: dict[int, Field] = {
    1: ("name", BYTES, not MANY),
    2: ("f", FIXED32, not MANY),
    3: ("i", VARINT, not MANY),
    4: ("s", BYTES, not MANY),
    5: ("t", BYTES, not MANY),
    6: ("g", BYTES, not MANY),
    7: ("floats", FIXED32, MANY),
    8: ("ints", VARINT, MANY),
    9: ("strings", BYTES, MANY),
    13: ("doc_string", BYTES, not MANY),
    20: ("type", VARINT, not MANY),
}
TENSOR: dict[int, Field] = {
    1: ("dims", VARINT, MANY),
    2: ("data_type", VARINT, not MANY),
    4: ("float_data", FIXED32, MANY),
    5: ("int32_data", VARINT, MANY),
    7: ("int64_data", VARINT, MANY),
    8: ("name", BYTES, not MANY),
    9: ("raw_data", BYTES, not MANY),
    10: ("double_data", FIXED64, MANY),
    11: ("uint64_data", VARINT, MANY),
    12: ("doc_string", BYTES, not MANY),
    13: ("external_data", BYTES, MANY),
    14: ("data_location", VARINT, not MANY),
    16: ("metadata_props", BYTES, MANY),
}
ENTRY: dict[int, Field] = {1: ("key", BYTES, not MANY), 2: ("value", BYTES, not MANY)}
VALUE: dict[int, Field] = {
    1: ("name", BYTES, not MANY),
    2: ("type", BYTES, not MANY),
    3: ("doc_string", BYTES, not MANY),
    4: ("metadata_props", BYTES, MANY),
}
TYPE: dict[int, Field] = {1: ("tensor_type", BYTES, not MANY), 6: ("denotation", BYTES, not MANY)}
TENSOR_TYPE: dict[int, Field] = {1: ("elem_type", VARINT, not MANY), 2: ("shape", BYTES, not MANY)}
SHAPE: dict[int, Field] = {1: ("dim", BYTES, MANY)}
DIMENSION: dict[int, Field] = {
    1: ("dim_value", VARINT, not MANY),
    2: ("dim_param", BYTES, not MANY),
    3: ("denotation", BYTES, not MANY),
}
INT64 = 7  # of TensorProto.DataType
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")

# Bits of an element by TensorProto.DataType; strings and complex numbers have no place in a step graph.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip


@dataclass(frozen=True)
class External:
    """Where a tensor's bytes lie in another file. `length` is the tensor's own, from its shape."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Value:
    """A graph's input or output: its element type, and its shape with None where a dimension is not fixed."""

    name: str
    element: int
    shape: tuple[int | None, ...]


@dataclass
class OnnxFile:
    """`nodes` are in the graph's order, those of a branch before its If. `elements` and `integers` are the
    initializers': how many numbers each has and, of integers in the graph itself, which, where they are few.
    """

    inputs: list[Value] = dataclass_field(default_factory=list)
    outputs: list[Value] = dataclass_field(default_factory=list)
    nodes: list[Node] = dataclass_field(default_factory=list)
    externals: list[External] = dataclass_field(default_factory=list)
    elements: dict[str, int] = dataclass_field(default_factory=dict)
    integers: dict[str, tuple[int, ...]] = dataclass_field(default_factory=dict)

    @property
    def operators(self) -> set[tuple[str, str]]:
        """The domain and type of every operator."""
        return {(node.domain, node.type) for node in self.nodes}


def read_onnx(data: bytes) -> OnnxFile:
    """What the model in `data` declares. Raises `OnnxFormatError`; never holds more than a small multiple of `data`."""
    graph = message(data, _graph_span(data), GRAPH, "graph")
    file = OnnxFile()
    _read_nodes(data, graph, file)
    for span in graph["initializer"]:
        if (external := _initializer(data, span, file)) is not None:
            file.externals.append(external)
    file.inputs = [_value(data, span) for span in graph["input"]]
    file.outputs = [_value(data, span) for span in graph["output"]]
    check_constants(file.nodes, {value.name for value in file.inputs}, file.elements, file.integers)
    return file


def relocated(data: bytes, places: Callable[[str], str]) -> bytes:
    """The model in `data` with every external tensor's location replaced by what `places` makes of it."""

    def entry(span: Span) -> bytes:
        fields = message(data, span, ENTRY, "external data entry")
        if text(data, fields, "key", "entry") != "location":
            return data[slice(*span)]
        value = places(text(data, fields, "value", "entry")).encode()
        return field(1, b"location") + field(2, value)

    def tensor(span: Span) -> bytes:
        return replaced(data, span, TENSOR, "external_data", entry)

    def graph(span: Span) -> bytes:
        return replaced(data, span, GRAPH, "initializer", tensor)

    return replaced(data, (0, len(data)), MODEL, "graph", graph)


def _graph_span(data: bytes) -> Span:
    return one(message(data, (0, len(data)), MODEL, "model"), "graph", "model")


def _read_nodes(data: bytes, graph: Fields, file: OnnxFile, branch: bool = False) -> None:
    """The operators of a graph and of its branches, which have none themselves and no tensors in other files."""
    for node in graph["node"]:
        fields = message(data, node, NODE, "node")
        operator = text(data, fields, "domain", "node"), text(data, fields, "op_type", "node")
        elements = 0
        for attribute in fields["attribute"]:
            given = message(data, attribute, ATTRIBUTE, "attribute")
            for span in given["t"]:
                elements += prod(_within(data, span))
            for span in given["g"]:
                if branch or operator != ("", "If"):
                    raise OnnxFormatError(
                        f"its operator {operator[1]!r} has a subgraph; expected one in an If, no deeper"
                    )
                inner = message(data, span, GRAPH, "branch")
                for tensor in inner["initializer"]:
                    _within(data, tensor)
                    _initializer(data, tensor, file)
                _read_nodes(data, inner, file, branch=True)
        inputs, outputs = (
            tuple(decoded(data, span, f"node's {name}") for span in fields[name]) for name in ("input", "output")
        )
        file.nodes.append(Node(*operator, inputs, outputs, elements))


def _within(data: bytes, span: Span) -> list[int]:
    """The dimensions of a tensor. Raises `OnnxFormatError` unless its bytes are in the graph itself."""
    dims, external = _tensor(data, span)
    if external is not None:
        raise OnnxFormatError(f"its constant {external.tensor!r} lies in another file")
    return dims


def _initializer(data: bytes, span: Span, file: OnnxFile) -> External | None:
    """Note an initializer's number of elements, and its integers where they are few. Returns where its bytes lie."""
    dims, external = _tensor(data, span)
    fields = message(data, span, TENSOR, "tensor")
    name = text(data, fields, "name", "tensor")
    file.elements[name] = prod(dims)
    if fields["data_type"] == [INT64] and external is None and prod(dims) <= MOST_DIMENSIONS:
        file.integers[name] = _integers(data, fields)
    return external


def _integers(data: bytes, fields: Fields) -> tuple[int, ...]:
    if fields["raw_data"]:
        start, end = fields["raw_data"][0]
        return struct.unpack(f"<{(end - start) // 8}q", data[start:end])
    return tuple(number - (1 << 64 if number >> 63 else 0) for number in numbers(data, fields["int64_data"]))


def _tensor(data: bytes, span: Span) -> tuple[list[int], External | None]:
    """A tensor's dimensions, and where its bytes lie unless in the graph itself: as many as its shape needs."""
    fields = message(data, span, TENSOR, "tensor")
    name = text(data, fields, "name", "tensor")
    if sum(count(data, value) for value in fields["dims"]) > MOST_DIMENSIONS * LONGEST_NUMBER:
        raise OnnxFormatError(f"its tensor {name!r} has more than {MOST_DIMENSIONS} dimensions")
    dims = list(numbers(data, fields["dims"]))
    element = one(fields, "data_type", f"tensor {name!r}")
    if element not in BITS:
        raise OnnxFormatError(f"its tensor {name!r} has element type {element}; expected numbers")
    if len(dims) > MOST_DIMENSIONS or any(dim >= 1 << 63 for dim in dims):
        raise OnnxFormatError(f"its tensor {name!r} has a negative dimension or more than {MOST_DIMENSIONS}")
    size = (prod(dims) * BITS[element] + 7) // 8
    if fields["data_location"] == [1]:
        return dims, _external(data, fields, name, size)
    if fields["external_data"]:
        raise OnnxFormatError(f"its tensor {name!r} names another file, but says that its bytes are in the graph")
    if fields["raw_data"]:
        start, end = fields["raw_data"][0]
        if end - start != size:
            raise OnnxFormatError(f"its tensor {name!r} has {end - start} bytes; its shape needs {size}")
    elif prod(dims) > sum(count(data, span) for key in TYPED for span in fields[key]) * max(1, 8 // BITS[element]):
        raise OnnxFormatError(f"its tensor {name!r} has fewer elements than its shape needs, {prod(dims)}")
    return dims, None


def _external(data: bytes, fields: Fields, name: str, size: int) -> External:
    entries: dict[str, str] = {}
    for span in fields["external_data"]:
        entry = message(data, span, ENTRY, "external data entry")
        key = text(data, entry, "key", "entry")
        if key in entries or key not in ("location", "offset", "length", "checksum"):
            raise OnnxFormatError(f"its tensor {name!r} has the external data key {key!r}, unknown or twice")
        entries[key] = text(data, entry, "value", "entry")
    numbers = {key: entries.get(key, default) for key, default in (("offset", "0"), ("length", str(size)))}
    for key, value in numbers.items():
        if not (value.isascii() and value.isdecimal() and len(value) < 19):
            raise OnnxFormatError(f"its tensor {name!r} has the {key} {value[:20]!r}; expected a number of bytes")
    if "location" not in entries or int(numbers["length"]) != size:
        raise OnnxFormatError(
            f"its tensor {name!r} has {numbers['length']} bytes in {entries.get('location')!r}; its shape needs {size}"
        )
    return External(name, entries["location"], int(numbers["offset"]), size)


def _value(data: bytes, span: Span) -> Value:
    fields = message(data, span, VALUE, "input or output")
    name = text(data, fields, "name", "input or output")
    where = f"input or output {name!r}"
    kind = message(data, one(fields, "type", where), TYPE, where)
    tensor = message(data, one(kind, "tensor_type", where), TENSOR_TYPE, where)
    shape: list[int | None] = []
    for dim in message(data, one(tensor, "shape", where), SHAPE, where)["dim"]:
        given = message(data, dim, DIMENSION, where)
        shape.append(given["dim_value"][0] if given["dim_value"] and not given["dim_param"] else None)
    return Value(name, one(tensor, "elem_type", where), tuple(shape))
