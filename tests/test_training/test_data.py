"""Every kind of source, what is held out, and what is refused."""

import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from wm_models.training import TrainingError
from wm_models.training.data import Corpus, Document, read_documents


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
        list(read_documents([str(tmp_path / name)]))
    assert words in str(error.value)


def test_bad_files_can_be_left_out(folder):
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    assert names([folder], skip_bad=True) == names([folder], skip_bad=True, exclude=["bad.txt"])


def test_nothing_there(tmp_path):
    with pytest.raises(TrainingError, match="no such file or directory"):
        list(read_documents([str(tmp_path / "none")]))


def split(documents, patterns=()):
    corpus = Corpus(lambda: documents, patterns)
    parts = list(corpus.training_documents()), list(corpus.held_out_documents())
    assert tuple(map(len, parts)) == (corpus.training, corpus.held_out)
    return parts


def test_held_out():
    documents = [Document(f"{number}.py", f"text {number}") for number in range(500)]
    kept, held = split(documents)
    assert 2 <= len(held) <= 25
    assert sorted(kept + held) == sorted(documents)
    more_kept, more_held = split([*documents, Document("another.py", "text")])
    assert set(held) <= set(more_held)
    assert set(kept) <= set(more_kept)
    assert [document.name for document in split(documents, ["7*.py"])[1]][:2] == ["7.py", "70.py"]
    for patterns in (["none"], ["*"]):
        with pytest.raises(TrainingError, match="held_out matches"):
            split(documents, patterns)


def test_one_document_gives_its_end():
    (kept,), (held,) = split([Document("book.txt", "abcdefghij" * 10)])
    assert kept.text + held.text == "abcdefghij" * 10
    assert len(held.text) == 5


def test_a_bad_line_leaves_out_its_whole_file(tmp_path):
    """It is named by its byte in the file, wherever in the file it is."""
    good = b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(100))
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "caf\xe9"}\n')
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(TrainingError, match=rf"a\.jsonl: is not UTF-8 \(byte {len(good) + 13}\)"):
        list(read_documents([str(tmp_path)]))
    assert names([tmp_path], skip_bad=True) == ["b.txt"]


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a", b"b"], [{"a": "b"}]], ids=lambda v: str(v)[:8])
def test_columns_that_are_no_text(tmp_path, values):
    """Integers, lists, bytes and structs: refused by their type, in a file as in a saved dataset."""
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        with pytest.raises(TrainingError, match=r"its column text has the type .*; expected string"):
            list(read_documents([str(tmp_path / source)]))


def test_every_column_of_strings(tmp_path):
    for kind in (pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        values = pyarrow.array(["one", None, "two"]).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        assert [document.text for document in read_documents([str(tmp_path)])] == ["one", "two"]


def test_parquet_that_is_not_utf_8(tmp_path):
    text = pyarrow.array([b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(TrainingError, match=r"a.parquet: is not UTF-8 .*--skip-bad"):
        list(read_documents([str(tmp_path)]))
    assert names([tmp_path], skip_bad=True) == ["b.txt"]


def test_pipes_are_no_files(tmp_path):
    """A named pipe is refused by name and passed over in a folder; it is never opened."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(TrainingError, match="is a pipe, a socket or a device"):
        list(read_documents([str(tmp_path / "pipe.txt")]))
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(TrainingError, match="no text found"):
            list(read_documents([str(source)]))


def test_lines_of_json_end_at_the_newline_alone(tmp_path):
    texts = ["one\u2028two", "three\u0085four\x0bfive", "six"]
    lines = "\ufeff" + "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert [document.text for document in read_documents([str(tmp_path)])] == texts


@pytest.mark.parametrize("line", ['{"text": "\\ud800"}', "[" * 100_000])
def test_lines_of_json_that_no_tokenizer_takes(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(TrainingError, match=r"a\.jsonl:1: "):
        list(read_documents([str(tmp_path)]))
