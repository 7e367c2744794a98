"""What memory there is, as the system says it, and a request for more than that."""

import numpy as np
import pytest

from runtime import RequestError, load, memory

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


def test_caches_that_do_not_fit_are_not_allocated(artifact, monkeypatch):
    """Both numbers are told, and the engine goes on with what it has."""
    engine = load(artifact)
    engine.reserve(1, 200)
    held = sum(cache.nbytes for cache in engine.session.caches)
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
