"""The number of usable CPUs, by the quotas of trees of cgroups as the kernel lays them out."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from serving.cpus import cpu_quota, usable_cpus

V1 = "5:cpuset:/other\n4:cpu,cpuacct:{}\n1:name=systemd:/other\n"
V2 = "0::{}\n"


def tree(root: Path, memberships: str, files: dict[str, str]) -> Path:
    """A file system with ``/proc/self/cgroup`` and the named files below ``/sys/fs/cgroup``."""
    for name, text in {"proc/self/cgroup": memberships, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"cpu{folder}/cpu.cfs_quota_us": f"{quota}\n", f"cpu{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("memberships", "files", "expected"),
    [
        # A container: the root is its own cgroup, with the path of the container, or that of the host if it sees it.
        pytest.param(V2.format("/"), {"cpu.max": "150000 100000"}, 1.5, id="v2-root"),
        pytest.param(V2.format("/docker/0a"), {"cpu.max": "150000 100000"}, 1.5, id="v2-path-of-the-host"),
        pytest.param(V1.format("/"), v1("", 150_000), 1.5, id="v1-root"),
        pytest.param(V1.format("/docker/0a"), v1("", 150_000), 1.5, id="v1-path-of-the-host"),
        # systemd: the root has no quota; on v2, not even the file.
        pytest.param(V2.format("/a.slice/b.service"), {"a.slice/b.service/cpu.max": "50000 100000"}, 0.5, id="v2-unit"),
        pytest.param(V1.format("/a.slice/b"), v1("", -1) | v1("/a.slice/b", 50_000), 0.5, id="v1-unit"),
        # Whichever is the smallest holds, at whatever level.
        pytest.param(V2.format("/a/b"), {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2, id="v2-above"),
        pytest.param(V2.format("/a/b"), {"a/cpu.max": "400000 100000", "a/b/cpu.max": "60000 20000"}, 3, id="v2-below"),
        pytest.param(V1.format("/a/b"), v1("", -1) | v1("/a", 200_000) | v1("/a/b", -1), 2, id="v1-above"),
        pytest.param(V1.format("/a/b"), v1("/a", 400_000) | v1("/a/b", 60_000, 20_000), 3, id="v1-below"),
        # Both versions at once, where only one of them has the controller.
        pytest.param(V1.format("/a") + V2.format("/b"), v1("/a", 200_000), 2, id="hybrid"),
        # The quota of another cgroup is not ours.
        pytest.param(V2.format("/a"), {"b/cpu.max": "100000 100000", "a/b/cpu.max": "9 9"}, math.inf, id="other"),
        pytest.param(V1.format("/a"), v1("/other", 100_000), math.inf, id="other-controller"),
        pytest.param(V2.format("/"), {"cpu.max": "max 100000"}, math.inf, id="v2-max"),
        pytest.param(V1.format("/"), {"cpu/cpu.cfs_quota_us": "100000"}, math.inf, id="v1-without-period"),
        pytest.param(V2.format("/a"), {}, math.inf, id="no-files"),
        pytest.param("", {}, math.inf, id="no-cgroups"),
    ],
)  # fmt: skip
def test_the_smallest_quota_on_the_way_to_the_root_holds(
    memberships: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    assert cpu_quota(tree(tmp_path, memberships, files)) == expected


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "expected"), [("50000", 1), ("199999", 1), ("200000", 2), ("900000", 4), ("max", 4)])
def test_cpus_are_whole_and_at_least_one(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert usable_cpus(tree(tmp_path, V2.format("/"), {"cpu.max": f"{quota} 100000"})) == expected
