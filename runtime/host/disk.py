"""Files that are whole on the disk before anything refers to them."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Write what the system holds of a file, or of a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """Bring every file and folder below `folder`, and itself, to the disk, with the permissions of new files here.

    Libraries that write through temporary files leave them readable by their owner alone, whatever the umask is.
    """
    probe = folder / ".mode"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            path.chmod(mode)
            sync(path)
        sync(Path(root))
