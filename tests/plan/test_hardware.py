"""The probe on made-up machines: a folder stands for `/`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quire.plan.hardware import Hardware, probe

GIB = 1 << 30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1000 kB\nMemAvailable: 8388608 kB\n"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    write(tmp_path, **{"proc/meminfo": MEMINFO, "proc/cpuinfo": "processor : 0\nflags : fpu avx2 avx512f amx_bf16\n"})
    return tmp_path


def test_bare_machine(root: Path) -> None:
    assert probe(root) == Hardware(
        cores=8, memory_total=16 * GIB, memory_free=8 * GIB, isa=("amx", "avx512", "avx2"), device="cpu"
    )


def test_version_2_limits_with_reclaimable_cache(root: Path) -> None:
    folder = "sys/fs/cgroup/a/b/"
    write(root, **{"proc/self/cgroup": "0::/a/b\n", folder + "memory.max": f"{4 * GIB}", folder + "cpu.max": "250000 100000"})
    write(
        root,
        **{folder + "memory.current": f"{3 * GIB}", folder + "memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 0\n"},
    )
    found = probe(root)
    assert (found.cores, found.memory_total, found.memory_free) == (2, 4 * GIB, 2 * GIB)


def test_the_tightest_level_binds(root: Path) -> None:
    write(
        root,
        **{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/cpu.max": "max 100000"},
    )
    write(root, **{"sys/fs/cgroup/a/memory.max": f"{GIB}", "sys/fs/cgroup/a/memory.current": "0"})
    found = probe(root)
    assert (found.cores, found.memory_free) == (8, GIB)


def test_version_1(root: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory/job/", "sys/fs/cgroup/cpu,cpuacct/job/"
    write(root, **{"proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"})
    write(root, **{memory + "memory.limit_in_bytes": f"{2 * GIB}", memory + "memory.usage_in_bytes": f"{GIB}"})
    write(root, **{memory + "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n"})
    write(root, **{cpu + "cpu.cfs_quota_us": "300000", cpu + "cpu.cfs_period_us": "100000"})
    found = probe(root)
    assert (found.cores, found.memory_total, found.memory_free) == (3, 2 * GIB, 3 * GIB // 2)


def test_version_1_without_limits(root: Path) -> None:
    write(root, **{"proc/self/cgroup": "4:memory:/\n3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"})
    write(root, **{"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert probe(root).memory_total == 16 * GIB


def test_container_whose_path_is_the_hosts(root: Path) -> None:
    write(root, **{"proc/self/cgroup": "0::/../../host/only\n", "sys/fs/cgroup/memory.max": f"{GIB}"})
    assert probe(root).memory_free == GIB


def test_more_used_than_allowed_is_zero(root: Path) -> None:
    write(root, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100", "sys/fs/cgroup/memory.current": "200"})
    assert probe(root).memory_free == 0


def test_a_share_of_a_core_is_one(root: Path) -> None:
    write(root, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert probe(root).cores == 1


def test_arm(root: Path) -> None:
    write(root, **{"proc/cpuinfo": "Features : fp asimd evtstrm\n"})
    assert probe(root).isa == ("neon",)


def test_without_proc_the_system_call_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError(name)
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2 * GIB // 4096}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    found = probe(tmp_path)
    assert (found.memory_total, found.memory_free, found.cores) == (2 * GIB, GIB, os.cpu_count())


def test_this_machine() -> None:
    found = probe()
    assert found.cores >= 1
    assert 0 < found.memory_free <= found.memory_total
