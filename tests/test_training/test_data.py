"""Every kind of source, what is held out, and what is refused."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from wm_models.training import TrainingError
from wm_models.training.data import Document, hold_out, read_documents


def names(sources, **options):
    return [document.name for document in read_documents([str(source) for source in sources], **options)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "b.md").write_text("second")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("third", "fourth", "")))
    table = pyarrow.table({"text": ["fifth", None, "sixth"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    return tmp_path


def test_a_folder(folder):
    found = read_documents([str(folder)])
    assert {document.name: document.text for document in found} == {
        "a.txt": "first", "c.jsonl:0": "third", "c.jsonl:1": "fourth",
        "d.parquet:0": "fifth", "d.parquet:2": "sixth", "sub/b.md": "second",
    }  # fmt: skip


def test_files_globs_and_patterns(folder):
    assert names([folder / "a.txt", folder / "sub"]) == ["a.txt", "b.md"]
    assert names([folder / "*.txt"]) == ["a.txt"]
    assert names([folder / "**" / "*.md"]) == ["b.md"]
    assert names([folder], exclude=["sub/*", "*.jsonl"]) == ["a.txt", "d.parquet:0", "d.parquet:2"]


def test_a_saved_dataset(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    assert names([tmp_path / "saved"]) == ["saved:0", "saved:1"]
    assert names([tmp_path / "splits"]) == ["splits:0", "splits:1"]


def test_the_standard_library_is_the_default():
    found = {document.name for document in read_documents([], exclude=["test/*", "*/test*/*", "idlelib/*"])}
    assert {"argparse.py", "json/decoder.py"} <= found
    assert not any(name.startswith("site-packages") for name in found)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"caf\xe9", "bad.txt: is not UTF-8 (byte 3)"),
        ("bad.jsonl", b'{"text": "x"}\n{"words": "x"}\n', "bad.jsonl:2: expected a JSON object with a field text"),
        ("bad.jsonl", b'{"text": 7}\n', "bad.jsonl:1: text is a int"),
        ("bad.parquet", b"no", "bad.parquet: is no parquet file"),
        ("bad.bin", b"no", "bad.bin: cannot tell its kind"),
        ("empty.txt", b"", "no text found in"),
    ],
)
def test_errors_name_the_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError) as error:
        read_documents([str(tmp_path / name)])
    assert words in str(error.value)


def test_bad_files_can_be_left_out(folder):
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    assert names([folder], skip_bad=True) == names([folder], skip_bad=True, exclude=["bad.txt"])


def test_nothing_there(tmp_path):
    with pytest.raises(TrainingError, match="no such file or directory"):
        read_documents([str(tmp_path / "none")])


def test_held_out():
    documents = [Document(f"{number}.py", f"text {number}") for number in range(500)]
    kept, held = hold_out(documents, [])
    assert 2 <= len(held) <= 25
    assert sorted(kept + held) == sorted(documents)
    more_kept, more_held = hold_out([*documents, Document("another.py", "text")], [])
    assert set(held) <= set(more_held)
    assert set(kept) <= set(more_kept)
    assert [document.name for document in hold_out(documents, ["7*.py"])[1]][:2] == ["7.py", "70.py"]
    for patterns in (["none"], ["*"]):
        with pytest.raises(TrainingError, match="held_out matches"):
            hold_out(documents, patterns)


def test_one_document_gives_its_end():
    (kept,), (held,) = hold_out([Document("book.txt", "abcdefghij" * 10)], [])
    assert kept.text + held.text == "abcdefghij" * 10
    assert len(held.text) == 5
