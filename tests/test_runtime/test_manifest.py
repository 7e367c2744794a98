"""The manifest's schema: what is written is read again, what is wrong is refused by name and place, and an artifact of
the first release loads and computes what it did.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from runtime import ArtifactError, load
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import Graph, Manifest, State, Window, manifest_json, parse_manifest

DATA = Path(__file__).parents[1] / "data"
ARTIFACT = DATA / "artifact-schema-1"  # written by release 0.1.0
SOUND = (ARTIFACT / "manifest.json").read_bytes()


def test_an_artifact_of_the_first_release():
    """Its logits are those that release 0.1.0 computed; another processor may round otherwise."""
    engine = load(ARTIFACT, "cpu", threads=1)
    found = [engine.prefill(np.random.default_rng(0).integers(3, 259, (1, 90)))]
    for _ in range(12):
        found.append(engine.decode([int(found[-1][0].argmax())]))
    np.testing.assert_allclose(np.concatenate(found), np.load(DATA / "artifact-schema-1.npy"), rtol=0, atol=1e-5)


def read(change=None):
    values = json.loads(SOUND)
    if change is not None:
        change(values)
    return parse_manifest(json.dumps(values).encode(), Path("a/manifest.json"))


def test_what_is_written_is_what_was_read():
    assert json.loads(manifest_json(read())) == json.loads(SOUND)
    engines = [{"file": "x.engine", "builder": 3}]
    found = read(lambda values: values.update(engines=engines, notes={"of": "somebody"}))
    assert found.sections == {"engines": engines, "notes": {"of": "somebody"}}
    assert parse_manifest(manifest_json(found), Path("manifest.json")) == found
    indexed = read(lambda values: values["graph"].update(indexed=True))
    assert indexed.graph.inputs[-1] == "logits_index"
    assert parse_manifest(manifest_json(indexed), Path("manifest.json")) == indexed


def test_a_long_wrong_value_is_shown_in_short():
    with pytest.raises(ArtifactError, match=r"is 'x+\.\.\.x+', which is none of its values; export again") as refused:
        read(lambda values: values["graph"]["states"][0]["shape"].__setitem__(0, "x" * 5000))
    assert len(str(refused.value)) < 300


def test_what_would_not_be_read_is_not_written():
    manifest = read()
    with pytest.raises(ArtifactError, match=r"graph\.max_batch is 0; expected int >= 1"):
        manifest_json(replace(manifest, graph=replace(manifest.graph, max_batch=0)))
    with pytest.raises(ValueError, match=r"capacities are \(64, 32\); expected rising sizes up to 192"):
        replace(manifest.graph, capacities=(64, 32))
    with pytest.raises(ValueError, match="indexed is true and logits 'all'; expected last"):
        replace(manifest.graph, logits="all", indexed=True)
    with pytest.raises(ValueError, match="keep is 8; expected 1 to 7"):
        Window(8, 8)
    with pytest.raises(ValueError, match="dtype is 'int4'; expected one of float32, float16, bfloat16, int8"):
        State("x", "y", ("batch",), "int4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema=-3), "schema -3; expected 1 to 2"),
        (lambda m: m.update(schema=True), "schema is bool; expected int"),
        (lambda m: m.pop("schema"), "schema is missing"),
        (lambda m: m["graph"].update(quantization=False), "graph.quantization is bool; expected str"),
        (lambda m: m["graph"].update(quantization="../x"), "graph.quantization is '../x'; expected str matching regex"),
        (lambda m: m["graph"].update(quantization="x" * 200), "graph.quantization is 'xxx"),
        (lambda m: m["graph"].pop("states"), "graph.states is missing"),
        (lambda m: m["graph"].update(logits="some"), "graph: logits is 'some'; expected one of last, all"),
        (lambda m: m["graph"]["states"][1].update(dtype="int4"), r"graph.states\[1\]: dtype is 'int4'"),
        (lambda m: m["graph"]["states"][1].update(output=3), r"graph.states\[1\].output is int; expected str"),
        (lambda m: m["graph"]["states"][1].update(shape=["batch", 0]), r"graph.states\[1\].shape\[1\] is 0; expected"),
        (lambda m: m["graph"]["states"][1].update(shape=["batch", "x"]), r"graph.states\[1\].shape\[1\]"),
        (lambda m: m["model"].update(parameters=1.5), "model.parameters is float; expected int"),
        (lambda m: m.update(verified="yes"), "verified is str; expected bool"),
        (lambda m: m["files"]["model.onnx"].update(size="1"), r"files.model.onnx.size is str; expected int"),
        (lambda m: m["files"].update({f"f{i}": {} for i in range(300)}), r"files has 30\d entries; expected up to 256"),
        (lambda m: m["model"].update(parameters="\ud800"), "model"),
    ],
)
def test_errors_say_what_and_where(change, words):
    with pytest.raises(ArtifactError, match=r"^a/manifest\.json: .*" + words) as caught:
        read(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("twice", ['"schema": 1', '"verified": true', '"model": {}'])
def test_a_key_that_is_given_twice(twice):
    """Readers of JSON differ in which of two values counts, so a second one could hide the first."""
    text = SOUND.replace(b"{", b"{" + twice.encode() + b", ", 1)
    with pytest.raises(ArtifactError, match=f"the key '{twice.split(chr(34))[1]}' is given twice"):
        parse_manifest(text, Path("manifest.json"))
    inner = SOUND.replace(b'"file":', b'"file": "x", "file":', 1)
    with pytest.raises(ArtifactError, match="the key 'file' is given twice"):
        parse_manifest(inner, Path("manifest.json"))


def test_any_plain_name_is_a_quantization():
    assert read(lambda m: m["graph"].update(quantization="nf4-g64")).graph.quantization == "nf4-g64"


@dataclass(frozen=True)
class Notes:
    author: str
    pages: int = 0


def test_a_section_is_its_owner_s(tmp_path):
    """Whoever owns a section reads it through a dataclass of its own; for the others it is not there."""
    directory = shutil.copytree(ARTIFACT, tmp_path / "copy")
    values = json.loads(SOUND)
    for notes in ({"author": "me", "pages": 3}, {"author": "me", "pages": "three"}):
        (directory / "manifest.json").write_text(json.dumps({**values, "notes": notes}))
        artifact = read_artifact(directory)
        assert artifact.section("engines", Notes) is None
        if notes["pages"] == 3:
            assert artifact.section("notes", Notes) == Notes("me", 3)
        else:
            with pytest.raises(ArtifactError, match=r"manifest\.json: notes\.pages is str; expected int"):
                artifact.section("notes", Notes)
        load(directory, "cpu")


def test_the_schema_is_simple_to_build():
    states = tuple(State(f"layers.0.{name}", f"layers.0.{name}.out", ("batch", 2, "capacity", size), "float32")
                   for name, size in (("key", 8), ("value", 8), ("bias", 1)))  # fmt: skip
    graph = Graph("m.onnx", "m.onnx", "float32", "none", "last", 99, 4, 64, (64,), states, window=Window(8, 16))
    manifest = replace(read(), graph=graph)
    assert isinstance(manifest, Manifest)
    assert parse_manifest(manifest_json(manifest), Path("manifest.json")).graph == graph
