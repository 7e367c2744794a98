"""How a sound file is damaged: its structure, its values, or its bytes."""

import copy
import json
import struct
import tomllib
from typing import Any

import onnx
import tomli_w
from google.protobuf.message import Message
from hypothesis import strategies as st

LARGEST_REPEAT = 5 << 20  # characters: more than a manifest may have


# Values that loaders trip over: wrong types, edges of integers, names that lead elsewhere.
ODD_TEXTS = ["", "..", "/etc/passwd", "../x", "a\0b", "\ud800", "float32", "batch", "model.onnx", "x" * 5000]
ODD_NUMBERS = [0, -1, 1, 2, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=20),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        found.extend(places(value[key]))
    return found


@st.composite
def changed_json(draw: Any, sound: bytes) -> bytes:
    """A JSON text with a few of its values replaced, dropped, moved or repeated; now and then cut or overwritten."""
    value = json.loads(sound)
    for _ in range(draw(st.integers(1, 3))):
        if not (all_places := places(value)):
            break
        container, key = draw(st.sampled_from(all_places))
        action = draw(st.sampled_from(["replace", "replace", "drop", "swap", "rename", "repeat"]))
        if action == "drop":
            del container[key]
        elif action == "swap":
            other, name = draw(st.sampled_from(all_places))
            container[key] = copy.deepcopy(other[name])
        elif action == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=8))] = container.pop(key)
        elif action == "repeat" and isinstance(container, list):
            most = max(1, LARGEST_REPEAT // len(json.dumps(container[key])))
            times = min(most, draw(st.sampled_from([1, 100, 20_000])))
            container.extend(copy.deepcopy(container[key]) for _ in range(times))
        else:
            container[key] = draw(values)
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return draw(changed_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


@st.composite
def changed_bytes(draw: Any, sound: bytes) -> bytes:
    """Bytes with a piece overwritten, taken out, put in or doubled."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64, 1 << 20])))
        piece = bytes(data[start:end])
        data[start:end] = draw(st.one_of(st.binary(max_size=12), st.just(piece * 2), st.just(b"")))
    return bytes(data)


@st.composite
def changed_graph(draw: Any, sound: bytes) -> bytes:
    """An ONNX model with a few fields changed anywhere in its tree of messages, or its bytes damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(sound))
    model = onnx.load_from_string(sound)
    for _ in range(draw(st.integers(1, 3))):
        message: Message = model
        while True:
            fields = message.ListFields()
            inner = [value for field, value in fields if field.message_type and not _many(field)]
            inner += [value for field, many in fields if field.message_type and _many(field) for value in many]
            if not inner or (message is not model and draw(st.integers(0, 3)) == 0):
                break
            message = draw(st.sampled_from(inner))
        field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
        change = draw(st.sampled_from(["clear", "set", "set", "double"]))
        try:
            if change == "clear":
                message.ClearField(field.name)
            elif change == "double" and _many(field):
                getattr(message, field.name).extend(list(getattr(message, field.name)))
            elif _many(field):
                if field.message_type:
                    getattr(message, field.name).add()
                else:
                    getattr(message, field.name).append(draw(_scalar(field)))
            elif not field.message_type:
                setattr(message, field.name, draw(_scalar(field)))
            else:
                getattr(message, field.name).SetInParent()
        except (TypeError, ValueError):
            pass  # protobuf's own limits
    return model.SerializeToString()


def _many(field: Any) -> bool:
    return field.is_repeated


def _scalar(field: Any) -> st.SearchStrategy:
    kinds = {
        field.CPPTYPE_STRING: st.sampled_from([*ODD_TEXTS[:4], "layers.0.key", "Loop", "val_1"]) | st.text(max_size=8),
        field.CPPTYPE_FLOAT: st.floats(width=32),
        field.CPPTYPE_DOUBLE: st.floats(),
    }
    if field.type == field.TYPE_BYTES:
        return st.binary(max_size=16)
    return kinds.get(field.cpp_type, st.sampled_from([-(1 << 31), *ODD_NUMBERS[:6], 1 << 40, (1 << 63) - 1]))


@st.composite
def changed_weights(draw: Any, sound: bytes) -> bytes:
    """A safetensors file with its header changed, its length field wrong, or its bytes damaged."""
    (length,) = struct.unpack("<Q", sound[:8])
    header, body = sound[8 : 8 + length], sound[8 + length :]
    header = draw(changed_json(header) | changed_bytes(header))
    length = draw(st.one_of(st.just(len(header)), st.sampled_from([n for n in ODD_NUMBERS if 0 <= n < 1 << 64])))
    return struct.pack("<Q", length) + header + (body if draw(st.booleans()) else body[: len(body) // 2])


@st.composite
def changed_engine(draw: Any, sound: bytes) -> bytes:
    """A manifest with its entry of an engine changed."""
    manifest = json.loads(sound)
    text = draw(changed_json(json.dumps(manifest["engines"]).encode()))
    try:
        manifest["engines"] = json.loads(text)
    except ValueError:
        return text
    return json.dumps(manifest).encode("utf-8", "surrogatepass")


@st.composite
def changed_toml(draw: Any, sound: bytes) -> bytes:
    """A TOML text with its values changed, where TOML can hold them, or with its bytes changed."""
    try:
        value = json.loads(draw(changed_json(json.dumps(tomllib.loads(sound.decode())).encode())))
        return tomli_w.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, AttributeError):  # it is no table, or holds a null
        return draw(changed_bytes(sound))
