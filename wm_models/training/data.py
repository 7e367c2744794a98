"""Text out of files: paths to documents, one at a time, and which of them are held out."""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from wm_models.training.errors import TrainingError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
HELD_OUT_SHARE = 50  # one document in so many, where nothing says which
SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    name: str  # its path below the folder it was found in, with ":" and its row where a file holds many
    text: str


def standard_library() -> Path:
    """The folder of the Python standard library's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def read_documents(sources: Sequence[str], exclude: Sequence[str] = (), skip_bad: bool = False) -> Iterator[Document]:
    """Every document of files, folders and globs of .txt, .md, .py, .jsonl and .parquet, and of directories that
    `datasets` saved, in order of their names; by default the standard library's, without installed packages.

    .jsonl and .parquet hold one document a row, in the field `text`, and are read row by row. `exclude` are patterns of
    names, as in `fnmatch`. Empty documents are left out, and with `skip_bad` so are files that are not UTF-8. Raises
    `TrainingError`.
    """
    found = False
    for source in sources or [str(standard_library())]:
        for root, file in files(source):
            name = file.relative_to(root).as_posix()
            if "site-packages" not in file.parts and not matches(name, exclude):
                for document in _read(file, name, skip_bad):
                    if document.text.strip():
                        found = True
                        yield document
    if not found:
        raise TrainingError(f"no text found in {', '.join(sources)}; expected {', '.join(SUFFIXES)} that are not empty")


class Corpus:
    """Documents to train on, and the ones to keep for measuring; `read` reads them anew each time.

    A document is held out by its name: one that `patterns` match or, without any, one in 50. Where that leaves either
    side empty, the last twentieth of the longest document is held out. `total`, `training` and `held_out` count
    documents.
    Raises `TrainingError` for patterns that match nothing, or everything.
    """

    def __init__(self, read: Callable[[], Iterable[Document]], patterns: Sequence[str]):
        self._read, self._patterns = read, patterns
        total = held_out = longest = cut = 0
        for document in read():
            if len(document.text) > longest:
                cut, longest = total, len(document.text)
            total += 1
            held_out += is_held_out(document.name, patterns)
        check_held_out(held_out, total, patterns)
        self._cut = None if 0 < held_out < total else cut  # the number of the document that is cut
        self.total = total
        self.training, self.held_out = (total - held_out, held_out) if self._cut is None else (total, 1)

    def training_documents(self) -> Iterator[Document]:
        """What is trained on, in order."""
        return (document for document, held_out in self._parts() if not held_out)

    def held_out_documents(self) -> Iterator[Document]:
        """What is measured on, in order."""
        return (document for document, held_out in self._parts() if held_out)

    def _parts(self) -> Iterator[tuple[Document, bool]]:
        """Every document, or part of one, and whether it is held out."""
        for number, document in enumerate(self._read()):
            if number == self._cut:
                at = len(document.text) * 19 // 20
                yield Document(document.name, document.text[:at]), False
                yield Document(f"{document.name} (end)", document.text[at:]), True
            else:
                yield document, self._cut is None and is_held_out(document.name, self._patterns)


class Measured:
    """Documents, of which the first and the bytes of all are known once they have been gone through."""

    def __init__(self, documents: Iterator[Document]):
        self.first, self.size, self._rest = next(documents), 0, documents

    def __iter__(self) -> Iterator[Document]:
        for document in chain([self.first], self._rest):
            self.size += len(document.text.encode())
            yield document


def is_held_out(name: str, patterns: Sequence[str]) -> bool:
    """Whether a document or chat of this name is held out: as `patterns` say or, without any, one in 50.

    That one is chosen by a hash of the name, so the choice stays when others are added.
    """
    if patterns:
        return matches(name, patterns)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def check_held_out(held_out: int, total: int, patterns: Sequence[str]) -> None:
    """Raise `TrainingError` for patterns that match nothing, or everything."""
    if patterns and not 0 < held_out < total:
        raise TrainingError(
            f"held_out matches {held_out} of {total} documents; expected some, and others to train on; "
            "give other patterns with --held-out, or --held-out '' to hold out one document in "
            f"{HELD_OUT_SHARE}"
        )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one that `patterns` describe, as in `fnmatch`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def files(source: str) -> Iterator[tuple[Path, Path]]:
    """Pairs of a folder and a file below it, in order; a directory of `datasets` stands for itself."""
    path = Path(source)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise TrainingError(f"{path}: cannot tell its kind; expected {', '.join(SUFFIXES)}")
    if path.is_file() or path.is_dir():
        yield from _below(path)
    elif path.exists():
        raise TrainingError(f"{path}: is a pipe, a socket or a device; expected a file or a folder")
    elif matches := sorted(glob.glob(source, recursive=True)):
        for match in matches:
            if Path(match).suffix in SUFFIXES:
                yield from _below(Path(match))
    else:
        raise TrainingError(f"{source}: no such file or directory, and no file matches it")


def _below(path: Path) -> Iterator[tuple[Path, Path]]:
    """As `_files`, for one file or folder; nothing for what is neither."""
    if path.is_file() or _is_dataset(path):
        yield path.parent, path
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                yield path, file


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _read(file: Path, name: str, skip_bad: bool) -> Iterator[Document]:
    try:
        if skip_bad:  # a file is left out as a whole, so it is read to its end before any of it counts
            for _ in _texts(file):
                pass
        for row, text in enumerate(_texts(file)):
            yield Document(f"{name}:{row}" if _has_rows(file) else name, text)
    except UnicodeDecodeError as error:
        if skip_bad:
            return
        raise TrainingError(
            f"{file}: is not UTF-8 (byte {error.start}); convert it, or leave such files out with --skip-bad"
        ) from error


def _has_rows(file: Path) -> bool:
    return file.is_dir() or file.suffix in (".jsonl", ".parquet")


def _texts(file: Path) -> Iterator[str]:
    if file.is_dir():
        return _dataset_texts(file)
    readers = {".parquet": _parquet_texts, ".jsonl": _json_texts}
    return readers.get(file.suffix, _whole_text)(file)


def _whole_text(file: Path) -> Iterator[str]:
    yield file.read_text(encoding="utf-8")


def _json_texts(file: Path) -> Iterator[str]:
    for number, row in json_rows(file):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(row, dict) or "text" not in row:
            raise TrainingError(f"{file}:{number}: expected a JSON object with a field text")
        if not isinstance(text, str):
            raise TrainingError(f"{file}:{number}: text is a {type(text).__name__}; expected a string")
        if SURROGATE.search(text):
            raise TrainingError(f"{file}:{number}: text has a surrogate without its pair; expected valid Unicode")
        yield text


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The value of each line that is not blank, with the line's number. Raises `TrainingError` for what is no JSON, and
    UnicodeDecodeError, whose `start` counts from the file's beginning."""
    read = 0
    # bytes, since "\n" alone ends a line: a JSON string may hold the other characters at which texts are split
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                error.start += read
                raise
            read += len(line)
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise TrainingError(f"{file}:{number}: expected a JSON object on each line") from error


def _parquet_texts(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_column(file, table.schema_arrow)
            for batch in table.iter_batches(columns=["text"]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainingError(f"{file}: is no parquet file: {error}") from error


def _dataset_texts(directory: Path) -> Iterator[str]:
    import datasets

    loaded = datasets.load_from_disk(os.fspath(directory))
    for split in loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]:
        _check_column(directory, split.data.schema)
        yield from (text or "" for text in split["text"])


def _check_column(path: Path, schema: Any) -> None:
    """Raise `TrainingError` unless an Arrow schema has one column `text` of strings."""
    from pyarrow import types

    found = [field.type for field in schema if field.name == "text"]
    if len(found) != 1:
        raise TrainingError(
            f"{path}: has {len(found)} columns named text; expected one; its columns are {', '.join(schema.names)}"
        )
    kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise TrainingError(f"{path}: its column text has the type {found[0]}; expected string")
