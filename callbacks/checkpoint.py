"""The checkpoints of a run: the last, and the best by evaluation return, both written after evaluations."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from qsm_lightning.checkpoints import run_folder
from qsm_lightning.datamodule import datamodule_of


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` after every evaluation, and copies it to ``best.ckpt`` at a new best return.

    Frames are the clock, so an evaluation is followed by a checkpoint whether or not an optimizer has stepped since the
    last one (``ModelCheckpoint`` goes by ``global_step`` and would leave such ones out). A resumed run keeps its best:
    score and file come along.
    """

    def __init__(self) -> None:
        self.best_return: float | None = None
        self.saved_at_frames: int | None = None
        self.last: Path | None = None
        self.best: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.last = run_folder(trainer) / "checkpoints" / "last.ckpt"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None and self.best.is_file() and self.best.parent != self._last.parent:
            self._copy_to_best(trainer, self.best)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = trainer.callback_metrics["eval/return"].item()
        improved = self.best_return is None or score > self.best_return
        if improved:
            self.best_return, self.best = score, self._last.with_name("best.ckpt")
        self.save(trainer)
        if improved:
            self._copy_to_best(trainer, self._last)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ended without an evaluation still leaves its state."""
        if datamodule_of(trainer).progress.frames != self.saved_at_frames and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write ``last.ckpt``; returns its path."""
        self.saved_at_frames = datamodule_of(trainer).progress.frames
        trainer.save_checkpoint(self._last, weights_only=False)
        return self._last

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_return": self.best_return, "best": str(self.best) if self.best else None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_return = state_dict["best_return"]
        self.best = Path(state_dict["best"]) if state_dict["best"] else None

    @property
    def _last(self) -> Path:
        assert self.last is not None, "used outside of a trainer"
        return self.last

    def _copy_to_best(self, trainer: Trainer, source: Path) -> None:
        if trainer.is_global_zero:
            target = self._last.with_name("best.ckpt")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target.with_suffix(".tmp"))
            os.replace(target.with_suffix(".tmp"), target)
        self.best = self._last.with_name("best.ckpt")
