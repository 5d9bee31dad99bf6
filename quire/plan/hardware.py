"""What this machine can really give: cores by affinity and quota, memory by machine and cgroup, vector instructions.

Only files of the kernel and `os` are read, so that a plan costs milliseconds. This room knows nothing of models.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Strongest first. AMX is listed only with its bfloat16 multiply, the form that the kernels use.
_X86_FLAGS = (("amx", "amx_bf16"), ("avx512", "avx512f"), ("avx2", "avx2"))
_ARM_FLAGS = (("neon", "asimd"), ("neon", "neon"))


@dataclass(frozen=True)
class Hardware:
    """One machine as this process may use it. memory_free: bytes that can be taken without swapping or being killed."""

    cores: int
    memory_total: int
    memory_free: int
    isa: tuple[str, ...] = ()
    device: str = "cpu"


def probe(root: Path = Path("/")) -> Hardware:
    """Look at the machine. `root` stands for `/` so that tests can show any machine."""
    total, free = _machine_memory(root)
    for level_limit, level_free in _memory_limits(root):
        total, free = min(total, level_limit), min(free, level_free)
    return Hardware(cores=_cores(root), memory_total=total, memory_free=max(0, free), isa=_isa(root))


def _cores(root: Path) -> int:
    """Cores of the affinity mask, cut to the cgroup's quota; a share of a core is not worth a thread."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for folder in _cgroup_folders(root, "cpu"):
        quota = _quota(folder)
        if quota is not None:
            cores = min(cores, int(quota))
    return max(1, cores)


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that this cgroup level may use, None for no limit."""
    words = _text(folder / "cpu.max").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if quota is not None and quota > 0 and period:
        return quota / period
    return None


def _machine_memory(root: Path) -> tuple[int, int]:
    """(total, available) of the whole machine."""
    table = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            table[name] = int(words[0]) * 1024
    if "MemTotal" in table:
        total = table["MemTotal"]
        return total, table.get("MemAvailable", table.get("MemFree", total // 2))
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        return total, page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        # macOS does not tell; half of the memory is what a desktop in use can give.
        return total, total // 2


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, still free) of every cgroup level that limits memory. Cache that the kernel would drop counts as free."""
    for folder in _cgroup_folders(root, "memory"):
        limit, usage = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is None:
            limit, usage = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is None or limit >= 1 << 60:  # version 1 writes "no limit" as a huge number
            continue
        yield limit, limit - max(0, (usage or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Bytes of file cache and slab that this level would give back under pressure."""
    table = {}
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdigit():
            table[name] = int(value)
    # Version 1 has both own and hierarchical ("total_") numbers; its usage is hierarchical.
    return sum(table.get("total_" + name, table.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folder and all above it, for version 2 and for that controller of version 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        number, controllers, path = parts
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controllers
            top = top if top.is_dir() else root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's and not exist; the levels that do exist are the ones that bind.
        folder = top / path.strip("/")
        while True:
            if folder.is_dir():
                yield folder
            if folder == top:
                break
            folder = folder.parent


def _isa(root: Path) -> tuple[str, ...]:
    flags: set[str] = set()
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    if not flags and platform.machine() in ("arm64", "aarch64"):
        flags = {"asimd"}
    return tuple(dict.fromkeys(name for name, flag in (*_X86_FLAGS, *_ARM_FLAGS) if flag in flags))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in the file; None if there is none or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None
