"""Text out of files: paths to documents, and which of them are held out."""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
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


def read_documents(sources: Sequence[str], exclude: Sequence[str] = (), skip_bad: bool = False) -> list[Document]:
    """Every document of files, folders and globs of .txt, .md, .py, .jsonl and .parquet, and of directories that
    `datasets` saved, in order of their names; by default the standard library's, without installed packages.

    .jsonl and .parquet hold one document a row, in the field `text`. `exclude` are patterns of names, as in `fnmatch`.
    Empty documents are left out, and with `skip_bad` so are files that are not UTF-8. Raises `TrainingError`.
    """
    found: list[Document] = []
    for source in sources or [str(standard_library())]:
        for root, file in files(source):
            name = file.relative_to(root).as_posix()
            if "site-packages" not in file.parts and not matches(name, exclude):
                found += (document for document in _read(file, name, skip_bad) if document.text.strip())
    if not found:
        raise TrainingError(f"no text found in {', '.join(sources)}; expected {', '.join(SUFFIXES)} that are not empty")
    return found


def hold_out(documents: Sequence[Document], patterns: Sequence[str]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and the ones to keep for measuring, by `held_out_names`.

    Where that leaves either side empty, the last twentieth of the longest document is held out.
    """
    chosen = held_out_names([document.name for document in documents], patterns)
    kept = [document for document, out in zip(documents, chosen, strict=True) if not out]
    held = [document for document, out in zip(documents, chosen, strict=True) if out]
    if not kept or not held:
        longest = max(documents, key=lambda document: len(document.text))
        cut = len(longest.text) * 19 // 20
        kept = [document for document in documents if document is not longest]
        kept.append(Document(longest.name, longest.text[:cut]))
        held = [Document(f"{longest.name} (end)", longest.text[cut:])]
    return kept, held


def held_out_names(names: Sequence[str], patterns: Sequence[str]) -> list[bool]:
    """Which names are held out: those that match `patterns`, without any one in 50.

    That one is chosen by a hash of the name, so the choice stays when others are added. Raises `TrainingError` for
    patterns that match nothing, or everything.
    """
    if not patterns:
        return [_hash(name) % HELD_OUT_SHARE == 0 for name in names]
    chosen = [matches(name, patterns) for name in names]
    if all(chosen) or not any(chosen):
        raise TrainingError(
            f"held_out matches {sum(chosen)} of {len(names)} documents; expected some, and others to train on; "
            "give other patterns with --held-out, or --held-out '' to hold out one document in "
            f"{HELD_OUT_SHARE}"
        )
    return chosen


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one that `patterns` describe, as in `fnmatch`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


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
    readers = {".parquet": _parquet_texts, ".jsonl": _json_texts}
    try:
        if file.is_dir():
            found = _rows(name, _dataset_texts(file))
        elif file.suffix in readers:
            found = _rows(name, readers[file.suffix](file))
        else:
            found = [Document(name, file.read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        if skip_bad:
            return
        raise TrainingError(
            f"{file}: is not UTF-8 (byte {error.start}); convert it, or leave such files out with --skip-bad"
        ) from error
    yield from found


def _rows(name: str, texts: Iterable[str]) -> list[Document]:
    return [Document(f"{name}:{row}", text) for row, text in enumerate(texts)]


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
    """The value of each line that is not blank, with the line's number. Raises `TrainingError` for what is no JSON."""
    # "\n" alone ends a line: a JSON string may hold the other characters at which splitlines() splits
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
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
