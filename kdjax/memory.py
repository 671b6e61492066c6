"""How much memory programs can use, according to the operating system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS, _PROC = Path("/sys/fs/cgroup"), Path("/proc")


def host_memory() -> tuple[int, int]:
    """Returns the bytes of memory available to this process, within limits set by a container, a job or `ulimit -v`.

    Returns:
      The total, and what is free now; 0 if unknown.
    """
    if not hasattr(os, "sysconf"):
        return 0, 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next((1024 * int(line.split()[1]) for line in _lines(_PROC / "meminfo") if line.startswith("MemAvail")), 0)
    for limit, used in (*_limits_of_groups(), *_limit_of_process()):
        if limit < total:
            total = limit
        free = min(free, max(0, limit - used))
    return total, free


def _limits_of_groups() -> Iterator[tuple[int, int]]:
    """Yields the limit and the usage of every control group this process is in."""
    places = {(_CGROUPS, ""), (_CGROUPS / "memory", "")}
    for line in _lines(_PROC / "self/cgroup"):  # 0::/user.slice, or in version 1 5:memory:/docker/1f3a
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            places |= {(_CGROUPS / controllers, str(parent)) for parent in (Path(path), *Path(path).parents)}
    for root, path in places:
        for limit, used, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            folder = root / path.lstrip("/")
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                most, now = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, used))
                stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
                yield most, now - int(stat.get(reclaimable, 0))  # without file cache that can be reclaimed


def _limit_of_process() -> Iterator[tuple[int, int]]:
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = next(iter(_lines(_PROC / "self/statm")), "0").split()[0]
        yield limit, int(pages) * os.sysconf("SC_PAGE_SIZE")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
