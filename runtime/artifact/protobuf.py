"""Protobuf messages, walked by tables of their fields.

A message is a list of numbered fields, so little has to be known to walk it. Whatever is not in a table is refused: a
field that is new, or given twice, could mean something else to another reader.
"""

from collections.abc import Callable, Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MANY = True
Field = tuple[str, int, bool]  # name, wire type, repeated
Span = tuple[int, int]
Fields = dict[str, list]  # numbers, or spans of the bytes

# Bounds before anything is built. An export of 24 layers has 900 nodes; no field of a message comes a thousand times.
MOST_DIMENSIONS, MOST_FIELDS = 8, 1 << 17
MOST = {"node": 1 << 16, "initializer": 1 << 16, "input": 1 << 15, "output": 1 << 15, "dim": MOST_DIMENSIONS}
LONGEST_NUMBER = 10  # bytes


class OnnxFormatError(ValueError):
    """The bytes are no ONNX model, or one with parts that a step graph has no use for."""


def message(data: bytes, span: Span, table: dict[int, Field], what: str) -> Fields:
    """The fields of the message in `span`, by name, each a list of what was given."""
    fields: Fields = {name: [] for name, _, _ in table.values()}
    for _, name, many, value in _walk(data, span, table, what):
        if fields[name] and not many:
            raise OnnxFormatError(f"its {what} gives {name} twice")
        fields[name].append(value)
        if len(fields[name]) > MOST.get(name, MOST_FIELDS):
            raise OnnxFormatError(f"its {what} has more than {MOST.get(name, MOST_FIELDS)} of {name}")
    return fields


def _walk(data: bytes, span: Span, table: dict[int, Field], what: str) -> Iterator[tuple[int, str, bool, int | Span]]:
    """Each field of a message: where it begins, its name, whether it may be repeated, and its number or span."""
    at, end = span
    count = 0
    while at < end:
        begin = at
        if (count := count + 1) > MOST_FIELDS:
            raise OnnxFormatError(f"its {what} has more than {MOST_FIELDS} fields")
        key, at = varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number not in table:
            raise OnnxFormatError(f"its {what} has field {number}, which no step graph uses")
        name, expected, many = table[number]
        if wire == VARINT:
            value, at = varint(data, at, end)
        elif wire == BYTES:
            length, at = varint(data, at, end)
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
        yield begin, name, many, value


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
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


def replaced(data: bytes, span: Span, table: dict[int, Field], name: str, change: Callable[[Span], bytes]) -> bytes:
    """The message in `span` with the content of each of its fields `name` changed."""
    parts, at = [], span[0]
    (number,) = (number for number, known in table.items() if known[0] == name)
    for begin, found, _, value in _walk(data, span, table, "message"):
        if found == name and isinstance(value, tuple):
            parts += [data[at:begin], field(number, change(value))]
            at = value[1]
    return b"".join([*parts, data[at : span[1]]])


def field(number: int, content: bytes) -> bytes:
    return varint_bytes(number << 3 | BYTES) + varint_bytes(len(content)) + content


def varint_bytes(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def numbers(data: bytes, values: list) -> Iterator[int]:
    """Numbers of a repeated field, packed or one by one."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at, end = value
        while at < end:
            number, at = varint(data, at, end)
            yield number


def count(data: bytes, value: int | Span) -> int:
    """At most how many numbers a repeated field's entry holds: one, or one a byte where packed."""
    return 1 if isinstance(value, int) else value[1] - value[0]


def one(fields: Fields, name: str, what: str) -> Any:
    if not fields[name]:
        raise OnnxFormatError(f"its {what} has no {name}")
    return fields[name][0]


def text(data: bytes, fields: Fields, name: str, what: str) -> str:
    return decoded(data, fields[name][0], f"{what}'s {name}") if fields[name] else ""


def decoded(data: bytes, span: Span, what: str) -> str:
    try:
        return data[slice(*span)].decode()
    except UnicodeDecodeError:
        raise OnnxFormatError(f"its {what} is no UTF-8") from None
