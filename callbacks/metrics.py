"""Writes what happened in training to the loggers, every so many frames, with frames as the x-axis."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import require_positive
from qsm_lightning.progress import RecentExperience


class TrainingMetrics(Callback):
    """Log training return and length, losses and update metrics, learning rates, speed and buffer size.

    Over all ranks: experience is put together, losses and update metrics are the mean of the ranks' own.

    Values go straight to the loggers: between two writes nothing is copied off the device, and Lightning's own
    per-metric bookkeeping is not paid for.

    Args:
        every_frames: frames between two writes.
    """

    def __init__(self, every_frames: int = 1_000) -> None:
        require_positive("metrics.", every_frames=every_frames)
        self.every_frames = every_frames
        self._logged_at = 0
        self._ended_at = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule_of(trainer).end_batches_every(self.every_frames)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_clock(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = datamodule_of(trainer)
        frames = data.progress.frames
        due = frames // self.every_frames > self._logged_at // self.every_frames
        ends = frames >= data.total_frames and frames not in (self._logged_at, self._ended_at)
        if not due and not ends:
            return
        recent = data.take_recent() if due else data.recent  # if this run goes on one day, its next row is as ever
        seconds = max(time.perf_counter() - self._time, 1e-9)
        ranks: list[dict[str, Any]] = data.ranks.gather(
            {
                "recent": asdict(recent),
                "buffer_size": len(data.buffer),
                "episodes": data.progress.episodes,
                "losses": {key: value.item() for key, value in pl_module.metrics.items()},  # type: ignore[operator, union-attr]
            }
        )
        recent = RecentExperience.of_all(RecentExperience(**rank["recent"]) for rank in ranks)
        metrics: dict[str, Any] = {f"train/{k}": v for k, v in recent.metrics().items()}
        metrics |= {
            "train/buffer_size": sum(rank["buffer_size"] for rank in ranks),
            "train/episodes": sum(rank["episodes"] for rank in ranks),
            "train/updates": data.progress.updates,
            "speed/frames_per_s": (frames - self._start_frames) / seconds,
            "speed/updates_per_s": (data.progress.updates - self._start_updates) / seconds,
        }
        metrics |= {key: sum(rank["losses"][key] for rank in ranks) / len(ranks) for key in ranks[0]["losses"]}
        if trainer.scaler is not None:
            metrics["update/loss_scale"] = trainer.scaler.get_scale()
            metrics["update/skipped_steps"] = pl_module.skipped_steps
        for term, optimizer in zip(pl_module.loss.terms, trainer.optimizers, strict=True):  # type: ignore[union-attr, arg-type]
            metrics[f"lr/{term}"] = optimizer.param_groups[0]["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=frames)
        if due:
            self._logged_at = frames
        self._ended_at = frames if ends else self._ended_at
        self._start_clock(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._time += time.perf_counter() - self._validation_start  # speed is training's alone

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"logged_at": self._logged_at, "ended_at": self._ended_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged_at, self._ended_at = state_dict["logged_at"], state_dict["ended_at"]

    def _start_clock(self, trainer: Trainer) -> None:
        """Speeds are measured from here: from the last write, or from where this process went on."""
        progress = datamodule_of(trainer).progress
        self._time, self._start_frames, self._start_updates = time.perf_counter(), progress.frames, progress.updates
