"""Stops a run whose loss is no longer a number, before anything of it is saved."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import TrainingFault
from qsm_lightning.losses.base import Metrics, non_finite


class StopOnNonFinite(Callback):
    """Raise :class:`~qsm_lightning.errors.TrainingFault` when a loss or metric of the last update is NaN or infinite.

    Checked on all ranks after each training batch, so that no evaluation and no checkpoint of a diverged run follows.
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = datamodule_of(trainer)
        metrics: Metrics = pl_module.metrics  # type: ignore[assignment]
        fault = None
        if (found := non_finite(metrics)) is not None:
            fault = TrainingFault(f"training diverged: {found} at frame {data.progress.frames}")
        data.stopping.agree(fault)
