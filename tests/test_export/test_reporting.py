"""report.html: it says what verification.json and the graph say, loads nothing, and is checked as any file is."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from safetensors.numpy import load_file

from export import OnnxOptions, export_onnx, verify
from export.reporting.document import REPORT, render
from export.reporting.weights import stored_weights, totals
from export.verification.comparison import Comparison
from export.verification.record import Origin
from runtime import ArtifactError, load
from runtime.artifact.integrity import read_artifact
from runtime.artifact.manifest import MANIFEST, parse_manifest
from wm_models import shipped_checkpoint


class Page(HTMLParser):
    """A page's tags with their attributes, the cells of its tables, and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert not self.open or tag in ("path", "use") or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "artifact"
    export_onnx("doge-3m", out, OnnxOptions(report=True, quantize="int8", max_length=200, max_batch=2))
    return out


def test_it_has_every_comparison_and_weight(reported):
    page = Page((reported / REPORT).read_text(encoding="utf-8"))
    record = json.loads((reported / "verification.json").read_text())
    assert "not verified" not in page.text
    for index, each in enumerate(record["comparisons"]):
        (row,) = [row for row in page.rows if row[0] == f"{index + 1}. {each['case']}"]
        assert row[1:3] == ["yes", f"{each['positions']:,}"]
        assert row[5] == f"{each['mean_kl']:.1e}"
    names = [row[0] for row in page.rows]
    weights = stored_weights(reported / "model.onnx")
    assert {weight.name for weight in weights} <= set(names)
    assert next(row for row in page.rows if row[0] == "model.onnx.data")[1] == (
        f"{(reported / 'model.onnx.data').stat().st_size:,}"
    )


def test_the_weights_are_those_of_the_checkpoint(reported):
    """A fused weight counts the numbers of its parts, so the sums agree; RoPE's frequencies are no parameter."""
    held = load_file(shipped_checkpoint() / "model.safetensors")
    layers = totals(stored_weights(reported / "model.onnx"), "layer")
    tables = [value for name, value in held.items() if "embed" in name or "lm_head" in name]
    assert layers["lm_head"][0] == tables[0].size
    for index in range(4):
        names = [name for name in held if f"layers.{index}.mlp." in name]
        weights = stored_weights(reported / "model.onnx")
        found = [each for each in weights if each.name.startswith(f"layers.{index}.mlp.")]
        assert sum(each.numbers for each in found) == sum(held[name].size for name in names)
        assert all(8 < each.bits < 10 for each in found)
    assert {each.part for each in stored_weights(reported / "model.onnx")} == {
        "attention", "MLP and experts", "embedding and head", "norms, residuals and other",
    }  # fmt: skip


def test_a_page_loads_nothing(reported):
    text = (reported / REPORT).read_text(encoding="utf-8")
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "iframe", "object", "img")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"url\((?!#)|@import", text)


def test_it_is_the_same_bytes_again_and_verify_renews_it(reported, tmp_path):
    directory = tmp_path / "artifact"
    shutil.copytree(reported, directory)
    before = (directory / REPORT).read_bytes()
    verify(directory)
    assert (directory / REPORT).read_bytes() == before
    load(directory)


def test_an_artifact_with_a_changed_report_is_refused(reported, tmp_path):
    directory = tmp_path / "artifact"
    shutil.copytree(reported, directory)
    text = (directory / REPORT).read_bytes()
    (directory / REPORT).write_bytes(text.replace(b"verified", b"approved"))
    with pytest.raises(ArtifactError, match=REPORT):
        read_artifact(directory)


def test_what_failed_is_said_and_names_are_text(reported):
    manifest = parse_manifest((reported / MANIFEST).read_bytes(), reported)
    record = json.loads((reported / "verification.json").read_text())
    comparisons = [Comparison(**each) for each in record["comparisons"]]
    failed = Comparison(**{**record["comparisons"][0], "passed": False, "mean_kl": 7.0})
    text = render(reported, manifest, Origin("<b>mine</b>"), [failed, *comparisons[1:]], ["model.onnx"])
    page = Page(text)
    assert "not verified" in page.text
    assert "<b>mine</b>" in page.text
    assert [row[1] for row in page.rows if row[0] == f"1. {failed.case}"] == ["NO"]
