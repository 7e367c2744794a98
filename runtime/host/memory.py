"""How much memory this process can still have, and in what pages it lies.

Linux grants more memory than there is, and kills who then uses it.
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np

from runtime.errors import RequestError

# Of each version of control groups: where they are mounted, a group's limit, what it uses, and how much of that is
# files kept in memory that would make room.
GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# glibc's mallopt(3): the options of <malloc.h>, the smallest block that is mapped on its own while freed memory is to
# go back to the system, and afterwards the values that glibc itself goes up to as it runs.
TRIM_THRESHOLD, MAP_THRESHOLD = -1, -3
SMALL_BLOCK, LARGE_BLOCK, LARGE_REST = 512 << 10, 32 << 20, 64 << 20

COLLAPSE = 25  # the advice MADV_COLLAPSE of <linux/mman.h>
# In smaps, a range of this process's memory that holds no file, and what follows about it.
ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?\n((?:\w+: .*\n)+)", re.MULTILINE)
# The same of a range that holds a file.
MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r[w-]-[ps] [0-9a-f]+ \S+ \d+ +(/.*)\n((?:\w+: .*\n)+)", re.MULTILINE)


def check_memory(size: int, what: str, freed: int = 0) -> None:
    """Raise `RequestError` where `size` bytes are more than there are, with the `freed` ones that are given back."""
    available = available_memory()
    if available is not None and size > available + freed:
        raise RequestError(
            f"{what} take {size / 1e9:.2f} GB, and {(available + freed) / 1e9:.2f} GB of memory are available; "
            "ask for fewer slots or fewer tokens"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine, and each control group this process is in, leave it. None where the system says nothing.

    `root` is where `proc` and `sys` are mounted.
    """
    found = [_number(root / "proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024)]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, limit, usage, files = GROUPS[controllers == "memory"]
        group = root / mount / name.lstrip("/")
        for folder in (path for path in (group, *group.parents) if path.is_relative_to(root / mount)):
            most, used = _number(folder / limit, r"(\d+)\s*$"), _number(folder / usage, r"(\d+)\s*$")
            if most is not None and used is not None:
                found.append(max(0, most - used) + (_number(folder / "memory.stat", rf"^{files} (\d+)$") or 0))
    return min((number for number in found if number is not None), default=None)


@contextmanager
def returned_memory() -> Iterator[None]:
    """While the block runs, memory that is freed goes back to the system; nothing but where glibc allocates.

    By itself glibc keeps freed blocks of up to 32 MB for later ones. A load allocates its quantised weights twice and
    frees them once, and so a process would stay as large as the two.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MAP_THRESHOLD, SMALL_BLOCK)
    try:
        yield
    finally:
        library.mallopt(MAP_THRESHOLD, LARGE_BLOCK)
        library.mallopt(TRIM_THRESHOLD, LARGE_REST)
        return_freed()


def return_freed() -> None:
    """Give the system what memory glibc holds of blocks that were freed; nothing where another library allocates."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def release(array: np.ndarray) -> None:
    """Give back the memory of an array that nothing reads any more, but for its first and last page.

    Its numbers become undefined. Nothing where the system has no such advice.
    """
    if sys.platform == "linux":
        start, page = array.ctypes.data, mmap.PAGESIZE
        first, end = -(-start // page) * page, (start + array.nbytes) // page * page
        if first < end:
            _advise(first, end - first, mmap.MADV_DONTNEED)


def release_files(folder: Path) -> None:
    """Take the pages of mapped files in `folder` out of this process's memory, of ranges that it has not written to.

    A load reads the weights there to lay them out anew. Whoever reads such a page again gets it from the file.
    """
    if sys.platform == "linux":
        for match in MAPPED.finditer(_text(Path("/proc/self/smaps"))):
            unwritten = re.search(r"^Anonymous: +0 kB$", match[4], re.MULTILINE) is not None
            if unwritten and Path(match[3]).is_relative_to(folder):
                start, end = int(match[1], 16), int(match[2], 16)
                _advise(start, end - start, mmap.MADV_DONTNEED)


def use_huge_pages() -> Thread | None:
    """Have Linux move what this process holds in memory into huge pages, in the background.

    A decode step reads every weight once, and in pages of 4 KB the processor looks up too many: with huge ones an int8
    step took 8 % less. The kernel's usual setting gives them to who asks, and ONNX Runtime does not. Only ranges that
    are in use from end to end are moved, so the process grows by nothing. Returns the thread that does it; None where
    the system has no such pages. A kernel before 6.1 refuses, and all stays as it was.
    """
    size = _number(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"), r"(\d+)")
    if size is None:
        return None

    def move() -> None:
        for start, end in _small_pages(_text(Path("/proc/self/smaps"))):
            for at in range(-(-start // size) * size, end // size * size, size):
                _advise(at, size, COLLAPSE)

    thread = Thread(target=move, name="huge pages", daemon=True)
    thread.start()
    return thread


def _advise(start: int, size: int, advice: int) -> None:
    """madvise(2), whose refusal leaves all as it was."""
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    call(start, size, advice)


def _small_pages(smaps: str, full: float = 0.9) -> Iterator[tuple[int, int]]:
    """The ranges of anonymous memory of which the share `full` is in use, and less than that in huge pages."""
    for match in ANONYMOUS.finditer(smaps):
        start, end = int(match[1], 16), int(match[2], 16)
        resident, huge = (int(match[3].split(f"\n{name}:")[1].split()[0]) * 1024 for name in ("Rss", "AnonHugePages"))
        if resident >= full * (end - start) and huge < full * resident:
            yield start, end


def _number(path: Path, pattern: str, unit: int = 1) -> int | None:
    match = re.search(pattern, _text(path), re.MULTILINE)
    return int(match[1]) * unit if match else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such system, or no such group in this container
        return ""
