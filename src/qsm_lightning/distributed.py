"""What the processes of a run tell each other. Alone, a process sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from qsm_lightning import durable

T = TypeVar("T")


def backward(module: LightningModule, loss: Tensor, optimizer: Optimizer) -> None:
    """Gradients of ``loss``, averaged over the ranks: what one process gets from all ranks' frames together.

    With plain ``ddp`` one message carries all gradients of the optimizer's parameters, after the backward pass. With
    ``ddp_find_unused_parameters_true`` torch's reducer sends them while the pass is under way; it has to look through
    the graph each time, as an update's two passes use different parts of the module.

    Args:
        module: the module under training.
        loss: scalar, this rank's mean over its part of the batch.
        optimizer: holds the parameters that ``loss`` is for.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
        module.manual_backward(loss)
        return
    with strategy.block_backward_sync():
        module.manual_backward(loss)
    if strategy.world_size == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = _flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat)
    flat /= strategy.world_size
    torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))


def batch_mean(value: Tensor) -> Tensor:
    """The mean of ``value`` [B, ...] over all of its entries on all ranks, scalar, detached.

    A loss that divides by a statistic of its batch takes the statistic from here: then K ranks with B / K frames each
    see the gradient that one process sees with B.
    """
    mean = value.detach().mean()
    if torch.distributed.is_initialized() and (count := torch.distributed.get_world_size()) > 1:
        torch.distributed.all_reduce(mean)
        mean /= count
    return mean


class Ranks:
    """The processes that train together, seen from one of them; all of them must make the same calls.

    Messages travel by gloo between CPUs, so that none waits for a device.

    Args:
        rank: number of this process, from 0.
        count: number of processes.
        timeout: seconds after which a rank that does not answer is an error; torch's own limit by default.
    """

    def __init__(self, rank: int = 0, count: int = 1, timeout: float | None = None) -> None:
        self.rank, self.count = rank, count
        limit = None if timeout is None else timedelta(seconds=timeout)
        self._group = torch.distributed.new_group(backend="gloo", timeout=limit) if count > 1 else None

    def gather(self, mine: T) -> list[T]:
        """Every rank's value (tensors and plain data), by rank."""
        if self.count == 1:
            return [mine]
        packed: list[bytes] = [b""] * self.count
        torch.distributed.all_gather_object(packed, durable.packed(mine), group=self._group)
        return [durable.unpacked(content) for content in packed]

    def attempt(self, act: Callable[[], T]) -> list[T]:
        """What ``act`` returned on every rank, by rank; where it raises :class:`OSError` on one, it does on all."""
        done: Any = None
        failed: OSError | None = None
        try:
            done = act()
        except OSError as error:
            failed = error
        results = self.gather((failed is not None, str(failed), done))
        for rank, (bad, why, _) in enumerate(results):
            if bad:
                raise failed or OSError(f"rank {rank}: {why}")
        return [result for _, _, result in results]

    def highest(self, *numbers: int) -> tuple[int, ...]:
        """The greatest of each of the numbers over the ranks."""
        if self.count == 1:
            return numbers
        greatest = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, group=self._group)
        return tuple(greatest.tolist())

    def share(self, total: int) -> int:
        """How many of ``total`` things each rank has, rounded up."""
        return -(-total // self.count)

    def part(self, total: int) -> range:
        """This rank's part of ``total`` things: each rank's follows the one's before, and sizes differ by one."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)
