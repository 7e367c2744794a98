"""A directory that is opened once, and in it each file once: what is checked and what is used are the same bytes."""

import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from runtime.errors import ArtifactError

CHUNK = 1 << 20  # bytes that are read at a time, so that a long reading can be stopped
LINKS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"  # where a descriptor has a path


class Folder:
    """The files of one directory, by descriptors that stay open: renaming and replacing change nothing any more.

    No link is followed and nothing but regular files is opened. Bytes that are overwritten in place are the one change
    that a descriptor sees; `check_unchanged` tells. Raises `ArtifactError`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"{path}: no such directory; expected an artifact written by wm-export") from error
        self._files: dict[str, tuple[int, os.stat_result]] = {}
        self._close = weakref.finalize(self, _close, self._descriptor, self._files)

    def size(self, name: str) -> int:
        """The bytes of a file. Raises `ArtifactError` where there is no such file, or it is not a regular one."""
        return self._open(name)[1].st_size

    def has(self, name: str) -> bool:
        """Whether the directory has an entry of that name, whatever it is."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        descriptor, found = self._open(name)
        return b"".join(_chunks(descriptor, found.st_size))

    def sha256(self, name: str, step: Callable[[], None] = lambda: None) -> str:
        """A file's hash; `step` is called between chunks and stops it by raising."""
        descriptor, found = self._open(name)
        digest = hashlib.sha256()
        for chunk in _chunks(descriptor, found.st_size):
            step()
            digest.update(chunk)
        return digest.hexdigest()

    def link(self, name: str) -> str:
        """A path, for as long as this object lives, that leads to the opened file, whatever its name leads to now."""
        return f"{LINKS}/{self._open(name)[0]}"

    def check_unchanged(self) -> None:
        """Raise `ArtifactError` where a file that was opened has been written to since."""
        for name, (descriptor, before) in self._files.items():
            now = os.fstat(descriptor)
            if _state(now) != _state(before):
                raise ArtifactError(f"{self.path / name}: was changed or replaced while it was loaded; load it again")

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `ArtifactError` where the path of a file that was opened leads to another file by now."""
        for name in names:
            path, opened = self.path / name, os.fstat(self._open(name)[0])
            now = os.stat(path, follow_symlinks=False)
            if (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
                raise ArtifactError(f"{path}: was changed or replaced while it was loaded; load it again")

    def forget(self, names: Iterable[str]) -> None:
        """Close the files `names`, which will not be read again."""
        for name in names:
            if name in self._files:
                os.close(self._files.pop(name)[0])

    def _open(self, name: str) -> tuple[int, os.stat_result]:
        if name not in self._files:
            # a pipe's opening would wait for a writer, but for O_NONBLOCK
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                descriptor = os.open(name, flags, dir_fd=self._descriptor)
            except FileNotFoundError:
                raise ArtifactError(
                    f"{self.path / name}: missing, though the manifest lists it; export again"
                ) from None
            except OSError as error:
                raise self._special(name, error.strerror) from None
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                os.close(descriptor)
                raise self._special(name, "not a regular file")
            self._files[name] = descriptor, found
        return self._files[name]

    def _special(self, name: str, reason: str | None) -> ArtifactError:
        return ArtifactError(
            f"{self.path / name}: is a link or a special file, so it may lie outside the artifact ({reason}); "
            "copy the file itself"
        )


def _state(found: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written to. A writer can set its time of change back, but not that of its status."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _chunks(descriptor: int, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, which may have become shorter or longer meanwhile."""
    at = 0
    while at < size and (chunk := os.pread(descriptor, min(CHUNK, size - at), at)):
        yield chunk
        at += len(chunk)


def _close(directory: int, files: dict[str, tuple[int, os.stat_result]]) -> None:
    for descriptor, _ in files.values():
        os.close(descriptor)
    files.clear()
    os.close(directory)
