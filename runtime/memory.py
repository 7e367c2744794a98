"""How much memory this process can still have. Linux grants more than there is, and kills who then uses it."""

import re
from pathlib import Path

from .errors import RequestError

# Of each version of control groups: where they are mounted, a group's limit, what it uses, and how much of that is
# files kept in memory that would make room.
GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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


def _number(path: Path, pattern: str, unit: int = 1) -> int | None:
    match = re.search(pattern, _text(path), re.MULTILINE)
    return int(match[1]) * unit if match else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such system, or no such group in this container
        return ""
