"""A checkpoint's directory, opened once, and in it each file once: what was recognised is what is loaded and copied."""

import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from wm_models.checkpoint.errors import CheckpointError

LINKS = "/proc/self/fd"  # where a descriptor has a path; on systems without, libraries read files by their names
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of the hub's cache: every file of a snapshot is a link to a blob


class CheckpointFolder:
    """The files of one directory, by descriptors that stay open: renaming and replacing change nothing any more.

    Nothing but regular files of the directory is opened. A link may lead to another file of the directory and, in the
    hub's cache, to the blobs beside the snapshot. Bytes that are overwritten in place are the one change that a
    descriptor sees; `check_unchanged` tells. Raises `CheckpointError`.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; expected a directory") from error
        self._files: dict[str, tuple[int, os.stat_result]] = {}
        self._close = weakref.finalize(self, _close, self._descriptor, self._files)

    def names(self) -> list[str]:
        """What the directory holds, whatever it is."""
        return sorted(os.listdir(self._descriptor))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, which is opened. Raises `CheckpointError` for what is no file of its
        own."""
        if name in self._files:
            return True
        try:
            descriptor = self._open(name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: cannot be read: {error.strerror}") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{self.path / name}: is no plain file; expected one of the checkpoint's own")
        self._files[name] = descriptor, found
        return True

    def opened(self) -> list[str]:
        """The files that were opened so far."""
        return sorted(self._files)

    def link(self, name: str) -> str:
        """A path, for as long as this object lives, that leads to an opened file, whatever its name leads to now."""
        return f"{LINKS}/{self._files[name][0]}" if os.path.isdir(LINKS) else str(self.path / name)

    def read(self, name: str) -> bytes:
        """An opened file's bytes."""
        descriptor, found = self._files[name]
        data = b""
        while len(data) < found.st_size and (part := os.pread(descriptor, found.st_size - len(data), len(data))):
            data += part
        return data

    @contextmanager
    def view(self) -> Iterator[str]:
        """A directory of links to the opened files, for libraries that load a checkpoint by its path."""
        with TemporaryDirectory(prefix="checkpoint-") as directory:
            for name in self._files:
                os.symlink(os.path.abspath(self.link(name)), os.path.join(directory, name))
            yield directory

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file that was opened has been written to since."""
        for name, (descriptor, before) in self._files.items():
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise CheckpointError(f"{self.path / name}: was written to while it was loaded; load it again")

    def _open(self, name: str) -> int:
        # a pipe's opening would wait for a writer, but for O_NONBLOCK
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except OSError:
            if not self._is_link(name):
                raise
        held = self._open_target(name)
        try:
            # what the link led to, which was looked at, and not what it leads to by now
            return os.open(f"{LINKS}/{held}", flags) if os.path.isdir(LINKS) else os.dup(held)
        finally:
            os.close(held)

    def _is_link(self, name: str) -> bool:
        return stat.S_ISLNK(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode)

    def _open_target(self, name: str) -> int:
        """What a link leads to, by a descriptor that is not read from; only where that is the checkpoint's own."""
        try:
            held = os.open(name, getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK), dir_fd=self._descriptor)
        except OSError as error:  # a link to nothing or to itself
            raise FileNotFoundError(error.errno, error.strerror) from error
        root, target = _place(self._descriptor, self.path), _place(held, self.path / name)
        roots = [root, root.parents[1] / BLOBS] if root.parent.name == SNAPSHOTS else [root]
        if not any(target.is_relative_to(each) for each in roots):
            os.close(held)
            raise CheckpointError(
                f"{self.path / name}: is a link out of the checkpoint, to {target}; copy the file itself"
            )
        return held


def _place(descriptor: int, path: Path) -> Path:
    """Where an opened file lies: by its descriptor where the system tells, else by its path."""
    return Path(os.path.realpath(f"{LINKS}/{descriptor}" if os.path.isdir(LINKS) else path))


def _close(directory: int, files: dict[str, tuple[int, os.stat_result]]) -> None:
    for descriptor, _ in files.values():
        os.close(descriptor)
    files.clear()
    os.close(directory)
