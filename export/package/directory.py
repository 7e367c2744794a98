"""Write a directory under a temporary name, and put it in its place when it is whole and on the disk."""

import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from export.errors import ExportError
from runtime.artifact.manifest import MANIFEST, Artifact

PARTIAL = ".partial"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new directory that takes `out`'s place when the block ends, and vanishes when it raises.

    Raises `ExportError` where `out` holds something and `force` is not set; with `force` the old content stays
    until the new one is whole.
    """
    check_free(out, force)
    out = out.resolve()  # where it is a link, what it leads to is replaced
    new = out.with_name(f".{out.name}.{token_hex(4)}{PARTIAL}")
    missing, lock = [parent for parent in out.parents if not parent.exists()], None
    try:
        lock = _begin(new, out)
        yield new
        for path in (*new.rglob("*"), new):
            if stat.S_ISREG(mode := path.lstat().st_mode) or stat.S_ISDIR(mode):
                _sync(path)
        _place(new, out, force)
        _sync(out.parent)
    except OSError as error:
        if error.filename is None:  # as the libraries that write weights raise it
            error.filename = str(out)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in missing:  # the innermost first
            with suppress(OSError):  # it holds something, or was never made
                parent.rmdir()


def _begin(new: Path, out: Path) -> int:
    """Make the directory `new` beside `out`; returns its lock. Raises `ExportError` where that is not allowed."""
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        return _locked(new)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written: {error.strerror}; the folder that holds it must allow new files"
        ) from error


def _locked(new: Path) -> int:
    """Make the directory `new`, with a lock on it that ends with this process, however that ends."""
    while True:
        new.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # another export swept it away before it was locked
            lock = os.open(new, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if new.exists():
                new.chmod(0o755)
                return lock
            os.close(lock)


def _sweep(out: Path) -> None:
    """Remove what exports to `out` left that were killed: unfinished directories that nobody holds locked."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*{PARTIAL}"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it is gone, or no directory and so not ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # another process is writing it
        finally:
            os.close(lock)


def _place(new: Path, out: Path, force: bool) -> None:
    """Give `new` the name `out`. Raises `ExportError` where another export has filled that and `force` is not set."""
    try:
        os.rename(new, out)  # to a free name, or an empty directory's
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        check_free(out, force)
        _exchange(new, out)


def _exchange(new: Path, out: Path) -> None:
    """Swap two directories in one step, so that whoever looks finds the old one whole or the new one."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None:
        if swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE) == 0:
            return
        if (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(out))
    # A file system that cannot swap: two steps, and back where the second fails.
    old = new.with_suffix(".old" + PARTIAL)
    os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have a file or directory on the disk before what refers to it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(out: Path, force: bool) -> None:
    """Raise `ExportError` unless an artifact may be written at `out`."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: is a file; expected a new or empty directory for --out")
    if out.exists() and any(out.iterdir()) and not force:
        raise ExportError(f"{out}: exists and is not empty; choose another --out, or --force to replace it")


@contextmanager
def revising(artifact: Artifact) -> Iterator[Path]:
    """A copy of the artifact by hard links that takes its place when the block ends, and vanishes when it raises.

    Files in it are changed by `write_file`, which leaves what has other names as it is. Raises `ExportError` where
    another process replaced the artifact meanwhile.
    """
    directory = artifact.path
    with replacing(directory, force=True) as new:
        shutil.copytree(directory, new, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield new
        if (directory / MANIFEST).read_bytes() != artifact.manifest:
            raise ExportError(f"{directory}: another export replaced it meanwhile; run this command again")


def _link(source: str, target: str) -> None:
    """Another name for a file, whatever its kind; a link is not followed, and nothing is opened."""
    os.link(source, target, follow_symlinks=False)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file; see `write_file`."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, in the place of one that has this name, in a directory that `replacing` will put in place.

    What had the name is unlinked, neither followed nor opened, and stays under its other names.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as stream:
        stream.write(data)
