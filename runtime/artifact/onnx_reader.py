"""What an ONNX file declares, read before ONNX Runtime sees it: its operators, its tensors, and where their bytes lie.

A protobuf message is a list of numbered fields, so little has to be known to walk it. Everything known is in the tables
below; whatever is not there is refused: a field that is new, or given twice, could mean something else to another
reader. Functions and training steps are refused too, and subgraphs but for the branches of an If, so no graph can loop.

The reader is our own because a protobuf library passes over just that, fields it does not know and fields given twice,
and because the runtime then needs neither `onnx` nor protobuf (38 ms and 12 MB to import). It is slower, 8 ms where
`onnx` takes 0.3 ms for a graph of 24 layers, once a load.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MANY = True
Field = tuple[str, int, bool]  # name, wire type, repeated

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
MOST_DIMENSIONS, MOST_FIELDS = 8, 1 << 20
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")

# Bits of an element by TensorProto.DataType; strings and complex numbers have no place in a step graph.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip


class OnnxFormatError(ValueError):
    """The bytes are no ONNX model, or one with parts that a step graph has no use for."""


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


@dataclass(frozen=True)
class OnnxFile:
    inputs: list[Value]
    outputs: list[Value]
    operators: set[tuple[str, str]]  # domain, type
    externals: list[External]


def read_onnx(data: bytes) -> OnnxFile:
    """What the model in `data` declares. Raises `OnnxFormatError`; never holds more than a small multiple of `data`."""
    graph = _message(data, _one(_message(data, (0, len(data)), MODEL, "model"), "graph", "model"), GRAPH, "graph")
    operators = _operators(data, graph)
    externals: list[External] = []
    for span in graph["initializer"]:
        if (external := _tensor(data, span)) is not None:
            externals.append(external)
    inputs = [_value(data, span) for span in graph["input"]]
    outputs = [_value(data, span) for span in graph["output"]]
    return OnnxFile(inputs, outputs, operators, externals)


Span = tuple[int, int]
Fields = dict[str, list]  # numbers, or spans of the bytes


def _operators(data: bytes, graph: Fields, branch: bool = False) -> set[tuple[str, str]]:
    """The operators of a graph and of its branches, which have none themselves and no tensors in other files."""
    operators: set[tuple[str, str]] = set()
    for node in graph["node"]:
        fields = _message(data, node, NODE, "node")
        operator = _text(data, fields, "domain", "node"), _text(data, fields, "op_type", "node")
        operators.add(operator)
        for attribute in fields["attribute"]:
            given = _message(data, attribute, ATTRIBUTE, "attribute")
            for span in given["t"]:
                _within(data, span)
            for span in given["g"]:
                if branch or operator != ("", "If"):
                    raise OnnxFormatError(
                        f"its operator {operator[1]!r} has a subgraph; expected one in an If, no deeper"
                    )
                inner = _message(data, span, GRAPH, "branch")
                for tensor in inner["initializer"]:
                    _within(data, tensor)
                operators |= _operators(data, inner, branch=True)
    return operators


def _within(data: bytes, span: Span) -> None:
    """Raise `OnnxFormatError` unless this tensor's bytes are in the graph itself."""
    if (external := _tensor(data, span)) is not None:
        raise OnnxFormatError(f"its constant {external.tensor!r} lies in another file")


def _message(data: bytes, span: Span, table: dict[int, Field], what: str) -> Fields:
    """The fields of the message in `span`, by name, each a list of what was given."""
    fields: Fields = {name: [] for name, _, _ in table.values()}
    at, end = span
    count = 0
    while at < end:
        if (count := count + 1) > MOST_FIELDS:
            raise OnnxFormatError(f"its {what} has more than {MOST_FIELDS} fields")
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number not in table:
            raise OnnxFormatError(f"its {what} has field {number}, which no step graph uses")
        name, expected, many = table[number]
        if wire == VARINT:
            value, at = _varint(data, at, end)
        elif wire == BYTES:
            length, at = _varint(data, at, end)
            value, at = (at, at + length), at + length
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            value, at = (at, at + size), at + size
        else:
            raise OnnxFormatError(f"its {what} is damaged at byte {at}: wire type {wire}")
        if at > end:
            raise OnnxFormatError(f"its {what} is truncated: {name} ends {at - end} bytes too late")
        if wire != expected and not (many and wire == BYTES):  # numbers in a row may be packed
            raise OnnxFormatError(f"its {what}'s {name} has wire type {wire}; expected {expected}")
        if fields[name] and not many:
            raise OnnxFormatError(f"its {what} gives {name} twice")
        fields[name].append(value)
    return fields


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise OnnxFormatError(f"it is damaged or truncated at byte {at}")


def _tensor(data: bytes, span: Span) -> External | None:
    """Where a tensor's bytes lie, unless in the graph itself. They must be as many as its shape needs."""
    fields = _message(data, span, TENSOR, "tensor")
    name = _text(data, fields, "name", "tensor")
    dims = list(_numbers(data, fields["dims"]))
    element = _one(fields, "data_type", f"tensor {name!r}")
    if element not in BITS:
        raise OnnxFormatError(f"its tensor {name!r} has element type {element}; expected numbers")
    if len(dims) > MOST_DIMENSIONS or any(dim >= 1 << 63 for dim in dims):
        raise OnnxFormatError(f"its tensor {name!r} has a negative dimension or more than {MOST_DIMENSIONS}")
    size = (prod(dims) * BITS[element] + 7) // 8
    if fields["data_location"] == [1]:
        return _external(data, fields, name, size)
    if fields["external_data"]:
        raise OnnxFormatError(f"its tensor {name!r} names another file, but says that its bytes are in the graph")
    if fields["raw_data"]:
        start, end = fields["raw_data"][0]
        if end - start != size:
            raise OnnxFormatError(f"its tensor {name!r} has {end - start} bytes; its shape needs {size}")
    elif prod(dims) > sum(_count(data, span) for key in TYPED for span in fields[key]) * max(1, 8 // BITS[element]):
        raise OnnxFormatError(f"its tensor {name!r} has fewer elements than its shape needs, {prod(dims)}")
    return None


def _external(data: bytes, fields: Fields, name: str, size: int) -> External:
    entries: dict[str, str] = {}
    for span in fields["external_data"]:
        entry = _message(data, span, ENTRY, "external data entry")
        key = _text(data, entry, "key", "entry")
        if key in entries or key not in ("location", "offset", "length", "checksum"):
            raise OnnxFormatError(f"its tensor {name!r} has the external data key {key!r}, unknown or twice")
        entries[key] = _text(data, entry, "value", "entry")
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
    fields = _message(data, span, VALUE, "input or output")
    name = _text(data, fields, "name", "input or output")
    where = f"input or output {name!r}"
    kind = _message(data, _one(fields, "type", where), TYPE, where)
    tensor = _message(data, _one(kind, "tensor_type", where), TENSOR_TYPE, where)
    shape: list[int | None] = []
    for dim in _message(data, _one(tensor, "shape", where), SHAPE, where)["dim"]:
        given = _message(data, dim, DIMENSION, where)
        shape.append(given["dim_value"][0] if given["dim_value"] and not given["dim_param"] else None)
    return Value(name, _one(tensor, "elem_type", where), tuple(shape))


def _numbers(data: bytes, values: list) -> Iterator[int]:
    """Numbers of a repeated field, packed or one by one."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at, end = value
        while at < end:
            number, at = _varint(data, at, end)
            yield number


def _count(data: bytes, value: int | Span) -> int:
    """At most how many numbers a repeated field's entry holds: one, or one a byte where packed."""
    return 1 if isinstance(value, int) else value[1] - value[0]


def _one(fields: Fields, name: str, what: str) -> Any:
    if not fields[name]:
        raise OnnxFormatError(f"its {what} has no {name}")
    return fields[name][0]


def _text(data: bytes, fields: Fields, name: str, what: str) -> str:
    if not fields[name]:
        return ""
    start, end = fields[name][0]
    try:
        return data[start:end].decode()
    except UnicodeDecodeError:
        raise OnnxFormatError(f"its {what}'s {name} is no UTF-8") from None
