"""Training in several processes that test_distributed.py looks into: what each rank computes, and what it is fed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.training import quiet_trainer
from pytorch_lightning import Callback, Trainer
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.losses import QSM
from qsm_lightning.losses.base import Metrics
from qsm_lightning.losses.qsm import EVERY
from qsm_lightning.module import OffPolicyModule
from tests.helpers import replay_batch
from tests.processes import CONTEXT, free_port

BATCH = 32
SMALL: dict[str, Any] = {"hidden": (16, 16), "time_dim": 8, "T": 3, "m_q": 1.0}


class Shared(QSM):
    """Draws the noise of all ranks together and takes this rank's rows, as one process would for the whole batch."""

    rank, count, drawn = 0, 1, 0

    def term_loss(self, term: str, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        batches = (len(tensordict), len(tensordict) // EVERY)
        drawn: dict[str, Any] = {"randn": torch.randn, "randint": torch.randint}

        def mine(draw: Callable[[list[int]], Tensor], shape: Any) -> Tensor:
            dim, rows = next((list(shape).index(rows), rows) for rows in batches if rows in shape)
            values = draw([self.count * size if i == dim else size for i, size in enumerate(shape)])
            return values.narrow(dim, self.rank * rows, rows).contiguous()

        def randn(shape: Any, **kwargs: Any) -> Tensor:
            return mine(lambda shape: drawn["randn"](shape, **kwargs), shape)

        def randint(high: int, shape: Any, **kwargs: Any) -> Tensor:
            return mine(lambda shape: drawn["randint"](high, shape, **kwargs), shape)

        self.drawn += 1
        fakes: dict[str, Any] = {
            "randn": randn,
            "randint": randint,
            "randn_like": lambda a: randn(a.shape, dtype=a.dtype),
        }
        with torch.random.fork_rng(), patch.multiple(torch, **fakes):
            torch.manual_seed(self.drawn)
            return super().term_loss(term, tensordict)


class Normalised(Shared):
    """Its target is divided by a statistic of the batch."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"m_q": "batch"})


class Adapted(Shared):
    """Its target has a size that is adapted to statistics of the batch."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"m_q": "auto", "score_at": "denoised", "entropy_bonus": 0.4})


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


class Fed(OffPolicyDataModule):
    """Collects as ever, and then trains on batches that are known beforehand."""

    fed = 0

    def next_round(self) -> list[TensorDictBase]:
        batch = super().next_round()
        whole = [replay_batch(BATCH, self.observation_dim, self.action_dim, self.fed + i) for i in range(len(batch))]
        self.fed += len(batch)
        mine = self.ranks.part(BATCH)
        rows = [one[mine.start : mine.stop] for one in whole]
        dtype = next(self.trainer.lightning_module.parameters()).dtype  # type: ignore[union-attr]
        cast = partial(_cast, dtype=dtype)
        return [row.apply(cast) for row in rows]


class Record(Callback):
    """Every gradient of every update, by term."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append(nn.utils.parameters_to_vector([p.grad for p in parameters]).clone())


def train(
    count: int,
    folder: Path,
    loss: type[QSM],
    data: type[OffPolicyDataModule],
    strategy: str,
    updates: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Train for ``updates``; returns what there is to compare."""
    warm_up, per_batch = 4 * BATCH, 4
    module_data = data(
        "Pendulum-v1",
        frames_per_batch=per_batch // count,
        total_frames=warm_up + updates,
        init_random_frames=warm_up,
        batch_size=BATCH,
        buffer_size=10_000,
        eval_every_frames=warm_up,
        eval_episodes=3,
        eval_selector="sample",
    )
    torch.manual_seed(0)
    module = OffPolicyModule(3, 1, partial(loss, **SMALL), ema=0.9).to(dtype)
    module.set_gradient_clipping(10.0 if issubclass(loss, Shared) else 0.5)
    record = Record()
    trainer = quiet_trainer(
        folder,
        accelerator="cpu",
        devices=count,
        strategy=strategy if count > 1 else "auto",
        callbacks=[record],
    )
    if isinstance(module.loss, Shared):
        module.loss.rank, module.loss.count = trainer.global_rank, count
    trainer.fit(module, module_data)
    return {
        "gradients": record.gradients,
        "module": module.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "replay": module_data.buffer[:].to_dict(),
        "noise": torch.randn(8),
        "frames": module_data.progress.frames,
        "updates": module_data.progress.updates,
        "returns": [] if not trainer.callback_metrics else trainer.callback_metrics["eval/return"].item(),
    }


def _rank(rank: int, count: int, port: int, folder: Path, args: Any) -> None:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    world |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(world if count > 1 else {})
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.save(train(count, folder, *args), folder / f"{rank}.pt")


def on_ranks(count: int, folder: Path, *args: Any) -> list[dict[str, Any]]:
    """:func:`train` in ``count`` processes; what each of them found."""
    folder.mkdir()
    port = free_port()
    processes = [CONTEXT.Process(target=_rank, args=(rank, count, port, folder, args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


class Buggy(QSM):
    """Raises what nobody expects, on the rank and in the update that the environment names."""

    updates = 0

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        self.updates += 1
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "1" and self.updates == 10:
            raise ValueError("a planted bug")
        return super().qvalue_loss(tensordict)


def frames_of(parts: list[dict[str, Any]]) -> Tensor:
    """The frames of several buffers as rows, sorted: two sets of frames are equal if these are."""
    flat = [TensorDict(part).auto_batch_size_(1).flatten_keys(".") for part in parts]
    rows = torch.cat([torch.cat([one["observation"], one["action"], one["next.reward"]], 1) for one in flat])
    return torch.unique(rows, dim=0)
