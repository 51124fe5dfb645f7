"""Data-parallel training: a run in several processes, on several GPUs or machines, started by torchrun.

    torchrun --nproc-per-node=2 -m train.fit SOURCE --name … --out …

Every process holds all the data and the whole network, and computes its share of every batch. Gradients are summed over
the processes before the optimisers see them, so that all take the same step. This is one explicit all-reduce per step
instead of DistributedDataParallel: for gradients of this size (13 MB), overlapping it with the backward pass gains
little, and the network, its state and its checkpoint stay the same objects as in one process.

BatchNorm normalises each process's share with that share's own statistics, as usual: synchronised statistics cost two
more exchanges per layer and step, and torch has them on GPUs only. The running statistics are averaged at the end of
every epoch; being moving averages, they come out as if they had been averaged at every step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

from train.command import CommandError

T = TypeVar("T")


class LostProcessError(CommandError):
    """Another process of the run has died."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, as seen by process ``rank``; by default the only one."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> slice:
        """The part of ``count`` items that belongs to this process."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor with its sum over the processes, in place, in a single all-reduce."""
        if self.size == 1:
            return
        mine = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in mine])
        with self._reporting_lost_process():
            distributed.all_reduce(flat)
        totals = flat.split_with_sizes([tensor.numel() for tensor in mine])
        for tensor, total in zip(mine, totals, strict=True):
            tensor.copy_(total.view_as(tensor))

    def broadcast(self, value: T) -> T:
        """The first process's ``value``, in every process."""
        if self.size == 1:
            return value
        values = [value]
        with self._reporting_lost_process():
            distributed.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def _reporting_lost_process(self) -> Iterator[None]:
        """A context for communication; raises ``LostProcessError`` when it fails."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank} of {self.size} has lost another, which may tell why; go on with --resume"
            ) from error


ALONE = Group()


@contextmanager
def join() -> Iterator[tuple[Group, torch.device]]:
    """The group that torchrun put this process in, and its device; only the first process prints.

    An exception that leaves the context is reported by every process.
    """
    group = Group(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    device = _device(int(os.environ.get("LOCAL_RANK", 0)))
    with ExitStack() as stack:
        if group.rank > 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        if group.size > 1:
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield group, device
        # Not after an error: the others may be gone, and would never reach the barrier.
        if group.size > 1:
            distributed.barrier()  # no process ends while another still communicates with it
            distributed.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise CommandError(
            f"process {local_rank} of this machine has no GPU; expected --nproc-per-node of at most "
            f"{torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
