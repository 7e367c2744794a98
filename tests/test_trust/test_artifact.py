"""An artifact that lies is refused before ONNX Runtime sees it: each lie is told with matching hashes."""

import os
import socket

import onnx
import pytest

from runtime import ArtifactError, load
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MOST_TOKENS
from runtime.artifact.onnx_reader import OnnxFormatError, read_onnx
from test_trust.samples import rewrite


def refused(directory, *words):
    with pytest.raises(ArtifactError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in (str(directory), *words):
        assert word in message


def change_graph(directory, change):
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    change(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    rewrite(directory)


def first_external(model):
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)


def set_entry(model, key, value):
    tensor = first_external(model)
    entry = next(entry for entry in tensor.external_data if entry.key == key)
    entry.value = value


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "sub/file", "..", ".", "", ".hidden", "a\0b", "a\nb",
             "\ud800", "C:\\file", "x" * 300]
)  # fmt: skip
def test_names_outside_the_directory(copy, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"x")
    entry = {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    rewrite(copy, lambda manifest: manifest["files"].update({name: entry}))
    refused(copy, "plain name")


@pytest.mark.parametrize("kind", ["link out", "link inside", "directory", "pipe", "socket"])
def test_only_plain_files_are_read(copy, tmp_path, kind):
    path = copy / "generation_config.json"
    data = path.read_bytes()
    path.unlink()
    if kind == "link out":
        (tmp_path / "outside.json").write_bytes(data)
        path.symlink_to(tmp_path / "outside.json")
    elif kind == "link inside":
        (copy / "other.json").write_bytes(data)
        path.symlink_to("other.json")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    else:
        server = socket.socket(socket.AF_UNIX)
        directory = os.open(copy, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{directory}/{path.name}")  # the whole path can be too long for a socket
        os.close(directory)
        server.close()
    refused(copy, "generation_config.json", "link or a special file")


def test_a_manifest_that_is_a_link_or_too_large(copy, tmp_path):
    (copy / "manifest.json").rename(tmp_path / "manifest.json")
    (copy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused(copy, "link")
    (copy / "manifest.json").unlink()
    with (copy / "manifest.json").open("wb") as stream:
        stream.truncate(1 << 40)
    refused(copy, "expected up to")


def test_sizes_come_before_contents(copy, monkeypatch):
    """A file whose size is wrong is not read."""
    with (copy / "model.onnx.data").open("r+b") as stream:
        stream.truncate(1 << 40)
    monkeypatch.setattr("runtime.artifact.folder.Folder.sha256", lambda *_: pytest.fail("it was read"))
    refused(copy, "model.onnx.data", str(1 << 40))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.update(max_length=1 << 40, capacities=[1 << 40]), "max_length"),
        (lambda g: g.update(max_length=True), "max_length is bool"),
        (lambda g: g.update(capacities=[True, 300]), "capacities[0] is bool"),
        (lambda g: g.update(capacities=list(range(44, 301))), "capacities has 257 entries"),
        (lambda g: g.update(max_batch=1 << 30), "max_batch"),
        (lambda g: g.update(vocabulary=1 << 30), "no such head"),
        (lambda g: g["states"][0].update(shape=["batch", 1 << 20, "capacity", 1 << 20]), "rows of 1099511627776"),
        (lambda g: g["states"][0].update(shape=["batch"] * 9), "shape"),
        (lambda g: g["states"][0].update(shape=["batch", 2, "capacity", 16]), "layers.0.key"),
        (lambda g: g["states"][0].update(dtype="float16"), "layers.0.key"),
        (lambda g: g["states"].pop(), "has 10 inputs"),
        (lambda g: g["states"].reverse(), "layers.1.bias"),
        (lambda g: g.update(vocabulary=96), "logits"),
        (lambda g: g.update(labels=0), "labels is 0"),
        (lambda g: g.update(labels=True), "labels is bool"),
        (lambda g: g.update(labels=None), "labels is null"),
        (lambda g: g.update(labels=1 << 40), "labels is 1099511627776"),
        (lambda g: g.update(labels=1 << 20), "labels is 1048576"),
        (lambda g: g.update(labels=96), "logits"),
        (lambda g: g.update(dtype="float16"), "logits"),
        (lambda g: g.update(file="config.json"), "model"),
        (lambda g: g.update(dtype="x" * 10_000), "dtype"),
    ],
)
def test_shapes_that_the_files_cannot_have(copy, change, words):
    rewrite(copy, lambda manifest: change(manifest["graph"]))
    refused(copy, words)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 100_000, "{", "\ud800", '{"schema": NaN}', "[]", "null", ""])
def test_json_that_is_none(copy, text):
    (copy / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(copy, "manifest.json")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/etc/passwd", "not among the manifest's files"),
        ("../secret", "not among the manifest's files"),
        ("*/_ORT_MEM_ADDR_/*", "not among the manifest's files"),  # to ONNX Runtime: an address in this process
        ("", "not among the manifest's files"),
        ("config.json", "which has"),
    ],
)
def test_weights_lie_in_listed_files(copy, location, words):
    change_graph(copy, lambda model: set_entry(model, "location", location))
    refused(copy, "model.onnx", words)


def nested(model):
    attribute = model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
    attribute.g.name = "inner"


def add_tensor(model, **fields):
    model.graph.initializer.append(onnx.TensorProto(name="extra", **fields))


def move_constant(model):
    tensor = onnx.TensorProto(name="c", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["extra"], value=tensor))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: set_entry(m, "offset", str(1 << 50)), "ends at byte"),
        (lambda m: set_entry(m, "offset", "-1"), "expected a number"),
        (lambda m: set_entry(m, "length", "4"), "its shape needs"),
        (lambda m: set_entry(m, "length", "1" * 30), "expected a number"),
        (lambda m: first_external(m).external_data.add(key="location", value="x"), "twice"),
        (lambda m: first_external(m).external_data.add(key="basepath", value="/etc"), "unknown"),
        (lambda m: first_external(m).dims.insert(0, 1 << 40), "its shape needs"),
        (lambda m: first_external(m).dims.insert(0, -1), "negative dimension"),
        (lambda m: first_external(m).dims.extend([1] * 9), "more than 8"),
        (lambda m: setattr(first_external(m), "data_location", 0), "names another file"),
        (lambda m: add_tensor(m, data_type=1, dims=[1 << 40], raw_data=b"1234"), "its shape needs"),
        (lambda m: add_tensor(m, data_type=1, dims=[1 << 40], float_data=[1.0]), "fewer elements"),
        (lambda m: add_tensor(m, data_type=8, dims=[1], string_data=[b"x"]), "field 6"),
        (lambda m: add_tensor(m, data_type=99, dims=[1]), "element type 99"),
        (move_constant, "lies in another file"),
        (nested, "has a subgraph"),
        (lambda m: m.functions.add(name="f"), "field 25"),
        (lambda m: m.training_info.add(), "field 20"),
        (lambda m: m.graph.sparse_initializer.add(), "field 15"),
        (lambda m: setattr(m.graph.node[0], "domain", "my.plugin"), "my.plugin"),
        (lambda m: setattr(m.graph.input[0], "name", "other"), "input_ids"),
        (lambda m: m.graph.output.pop(), "has 6 outputs"),
    ],
)
def test_a_graph_that_lies(copy, change, words):
    change_graph(copy, change)
    refused(copy, "model.onnx", words)


def test_a_field_given_twice_is_refused(artifact):
    """Readers of protobuf differ in which of two values counts, so a second one could hide the first."""
    data = (artifact / "model.onnx").read_bytes()
    read_onnx(data)
    with pytest.raises(OnnxFormatError, match="twice"):
        read_onnx(data + onnx.ModelProto(graph=onnx.GraphProto(name="more")).SerializeToString())


def test_the_reader_agrees_with_onnx(artifact):
    data = (artifact / "model.onnx").read_bytes()
    found, model = read_onnx(data), onnx.load_from_string(data)
    assert [value.name for value in found.inputs] == [value.name for value in model.graph.input]
    assert [value.name for value in found.outputs] == [value.name for value in model.graph.output]
    assert found.operators == {(node.domain, node.op_type) for node in model.graph.node}
    expected = [
        (tensor.name, *(entry.value for entry in tensor.external_data))
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert [(t.tensor, t.location, str(t.offset), str(t.length)) for t in found.externals] == expected
    assert expected
    for value, declared in zip(found.inputs, model.graph.input, strict=True):
        dims = declared.type.tensor_type.shape.dim
        assert value.shape == tuple(None if dim.dim_param else dim.dim_value for dim in dims)
        assert value.element == declared.type.tensor_type.elem_type


def test_a_tokenizer_that_is_none(copy):
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    rewrite(copy, lambda m: m["files"].update({"tokenizer.json": {}}))
    rewrite(copy)
    refused(copy, "tokenizer.json", "no tokenizer")


def test_an_artifact_tells_nothing_of_its_maker_s_sources(artifact):
    """The exporter notes where in the sources each node came from."""
    assert b"site-packages" not in (artifact / "model.onnx").read_bytes()
    assert b".py" not in (artifact / "model.onnx").read_bytes()


def test_bounds_leave_room_for_models(artifact):
    assert read_artifact(artifact).graph.max_length == 300
    assert MOST_TOKENS >= 1 << 24
