"""How many CPUs this process may use: by its affinity, and by the quotas of its cgroup and of those above it."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def usable_cpus(root: Path = Path("/")) -> int:
    """Whole CPUs, at least one."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that this process may use, infinite without a quota (cgroups(7)); ``root`` holds /proc, /sys.

    Each cgroup on the way to the root may have a quota, and the smallest holds: systemd's ``CPUQuota=`` is one of a
    unit far below the root. In a container, the path may be the host's, and absent here; the root is then the
    container's own cgroup.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return math.inf
    smallest, mounts = math.inf, root / "sys/fs/cgroup"
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:  # cgroup v2
            mount, files = mounts, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, files = mounts / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            smallest = min(smallest, _quota(*(mount / folder / file for file in files)))
    return smallest


def _quota(*files: Path) -> float:
    """The quota that the files of a cgroup hold, quota and period together; infinite if they are missing."""
    try:
        quota, period = (word for file in files for word in file.read_text().split())
    except OSError:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
