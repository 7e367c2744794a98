"""What memory there is, as the system says it, and a request for more than that."""

import ctypes
import mmap
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import RequestError, load
from runtime.host import memory

GB = 1 << 30


def system(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal:       99999999 kB\nMemAvailable:    {8 * GB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, 8 * GB),
        ({**MACHINE, "proc/self/cgroup": "0::/\n"}, 8 * GB),
        # a group of version 2, and one around it; files in memory make room
        (
            {
                **MACHINE,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": f"{GB}\n",
                "sys/fs/cgroup/a/memory.max": f"{4 * GB}\n",
                "sys/fs/cgroup/a/memory.current": f"{3 * GB}\n",
                "sys/fs/cgroup/a/memory.stat": f"anon 5\nfile 9\ninactive_file {GB}\n",
            },
            2 * GB,
        ),
        # version 1, seen from a container: the group's own path is not there, its limit is at the mount
        (
            {
                **MACHINE,
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB // 2}\n",
            },
            GB // 2,
        ),
    ],
)
def test_what_the_system_says(tmp_path, files, expected):
    assert memory.available_memory(system(tmp_path, files)) == expected


def test_this_machine():
    assert memory.available_memory() is None or memory.available_memory() > 0


def huge_and_resident(address):
    """Bytes in huge pages, and bytes in memory, of the range around an address."""
    for entry in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in entry.split()[0].split("-"))
        if start <= address < end:
            return tuple(int(re.search(rf"\n{name}: +(\d+) kB", entry)[1]) << 10 for name in ("AnonHugePages", "Rss"))
    raise LookupError(address)


@pytest.mark.skipif(memory.use_huge_pages() is None, reason="a system without huge pages")
def test_huge_pages():
    """What is in use from end to end is moved and keeps its content; what is not is left as small as it is."""
    size = 32 << 20
    parts = []
    # advised differently, or the kernel makes one range of two neighbours
    for stride, advice in ((1, mmap.MADV_DONTFORK), (64 * mmap.PAGESIZE, mmap.MADV_DONTDUMP)):
        held = mmap.mmap(-1, size, mmap.MAP_PRIVATE)
        held.madvise(advice)
        content = np.frombuffer(held, np.uint8)
        content[::stride] = 7
        parts.append(content)
    addresses = [content.ctypes.data for content in parts]
    before = [huge_and_resident(address) for address in addresses]
    memory.use_huge_pages().join()
    (huge, _), (_, resident) = (huge_and_resident(address) for address in addresses)
    if not huge:
        pytest.skip("a kernel that moves no memory into huge pages on request")
    assert before[0][0] == 0
    assert huge >= size - (4 << 20)
    assert resident == before[1][1] < size // 8
    assert (parts[0] == 7).all()


def test_caches_that_do_not_fit_are_not_allocated(artifact, monkeypatch):
    """Both numbers are told, and the engine goes on with what it has."""
    engine = load(artifact)
    engine.reserve(1, 200)
    held = sum(flat.nbytes for flat in engine.session.memory)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(RequestError, match=r"caches for 1 slots of 300 tokens take 0\.\d+ GB, and 0\.00 GB of memory"):
        engine.generate_ids([1] * 200, 90)
    engine.reset()
    assert np.isfinite(engine.prefill([[1, 2, 3]])).all()
    # the old caches are given back before new ones of another shape are filled
    monkeypatch.setattr(memory, "available_memory", lambda: held)
    engine.reserve(1, 300)
    with pytest.raises(RequestError, match="for 3 slots"):
        engine.reserve(3, 300)
    engine.prefill([[1, 2, 3]])


def in_a_new_process(function, *arguments):
    """Earlier tests have freed no memory there, and left no threads that move pages."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_freed_memory_goes_back():
    in_a_new_process(free_blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="a system without this advice")
def test_released_memory(tmp_path):
    in_a_new_process(release_pages, tmp_path)


def free_blocks():
    """Blocks that glibc would keep for later are no part of the process any more, though what lies between them is."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE  # noqa: E731
    count, size = 64, 1 << 20
    np.ones(16 * size, np.uint8)  # whose end has glibc keep smaller blocks from now on
    before = resident()
    with memory.returned_memory():
        blocks = [np.ones(size, np.uint8) for _ in range(count)]
        assert resident() - before > count * size // 2
        del blocks[1::2]
        assert resident() - before < count * size * 3 // 4
        del blocks
    assert resident() - before < count * size // 4


def release_pages(folder):
    """Pages that were given back count no more; those of a file are read again, but for those that were written to."""
    size = 8 << 20
    array = np.ones(size, np.uint8)
    _, before = huge_and_resident(array.ctypes.data + size // 2)
    memory.release(array)
    assert huge_and_resident(array.ctypes.data + size // 2)[1] <= before - size * 3 // 4
    (folder / "file").write_bytes(bytes([7]) * size)
    mapped = {access: np.memmap(folder / "file", np.uint8, access) for access in ("r", "c")}
    mapped["c"][0] = 8
    held = [mapped[access].sum(dtype=np.int64) for access in ("r", "c")]
    memory.release_files(folder)
    resident = [huge_and_resident(mapped[access].ctypes.data)[1] for access in ("r", "c")]
    assert resident == [0, size]
    assert [mapped[access].sum(dtype=np.int64) for access in ("r", "c")] == held == [7 * size, 7 * size + 1]
