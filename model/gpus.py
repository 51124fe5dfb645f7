"""Which NVIDIA GPUs this process can compute on, found without loading torch where there are none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec

PROBED = "CUDA_DEVICES_PROBED"
"""Environment variable that passes the number of usable GPUs on to child processes."""
PROBE = """
import torch
torch.zeros(1, device="cuda").add(1).cpu()
usable, reason = 1, ""
while usable < torch.cuda.device_count():
    try:
        torch.zeros(1, device=f"cuda:{usable}").add(1).cpu()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        break
    usable += 1
print(usable, reason)
"""
"""Prints how many GPUs torch can compute on, and why not on the next one. CUDA puts the fastest GPUs first."""
PROBE_SECONDS = 120.0

logger = logging.getLogger("classifier.gpus")


def cuda_devices() -> int:
    """How many NVIDIA GPUs torch can use. The driver is asked first, so that torch need not be loaded to find none.

    A GPU that is present may be unusable: it or its driver may be too old for this torch, or it may be partitioned
    (MIG). So a separate process tries it, once for this process and all its children.
    """
    if PROBED not in os.environ:
        os.environ[PROBED] = str(_probe() if find_spec("torch") and has_gpu() else 0)
    return int(os.environ[PROBED])


def has_gpu() -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` leaves an NVIDIA GPU visible; a driver that does not answer counts as one."""
    import pynvml

    is_visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount()) and is_visible
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return False
    except pynvml.NVMLError as error:  # for one, after a driver update until the next reboot
        logger.warning("the NVIDIA driver does not answer: %s", error)
        return is_visible


def _probe() -> int:
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        usable, _, reason = done.stdout.strip().partition(" ")
        if reason:
            logger.warning("torch cannot use GPU %s, nor those after it: %s", usable, reason)
        return int(usable)
    except (subprocess.SubprocessError, ValueError) as error:
        told = getattr(error, "stderr", None) or str(error)
        logger.warning("torch cannot use the GPU of this machine: %s", told.strip().splitlines()[-1])
        return 0
