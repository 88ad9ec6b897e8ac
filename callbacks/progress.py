"""The progress of a run over its frames: Lightning's rich bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from typing_extensions import override

from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import tell


class FrameProgress(RichProgressBar):
    """One bar over ``data.total_frames`` with evaluation return, frames/s, updates/s and time left.

    When standard output is not a terminal it prints a line after each evaluation and every ``line_seconds``.
    """

    def __init__(self, line_seconds: float = 30.0) -> None:
        super().__init__(refresh_rate=4, leave=True)
        self.line_seconds = line_seconds
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._return: float | None = None
        if not self.is_terminal:
            super().disable()

    @override
    def enable(self) -> None:
        """Without a terminal the bar stays off and lines are printed."""
        if self.is_terminal:
            super().enable()

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's columns up to the number of frames; times and speeds stand in :meth:`get_metrics`."""
        return super().configure_columns(trainer)[:3]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        progress = datamodule_of(trainer).progress
        self._start = self._mark = (time.monotonic(), progress.frames, progress.updates)
        self._speed = (0.0, 0.0)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One bar for the whole run, not one per epoch."""
        if self.progress is not None and self.train_progress_bar_id is None:
            total = datamodule_of(trainer).total_frames
            self.train_progress_bar_id = self._add_task(total, "Frames")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.monotonic() - self._mark[0]
        if seconds < (0.5 if self.is_terminal else self.line_seconds):
            return
        self._measure(trainer)
        if self.is_terminal:
            self._update(self.train_progress_bar_id, datamodule_of(trainer).progress.frames)
            self._update_metrics(trainer, pl_module)
        else:
            self._print_line(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(self.train_progress_bar_id, datamodule_of(trainer).progress.frames, hard=True)
        super().on_train_end(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            self._measure(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._return = trainer.callback_metrics["eval/return"].item()
        self._mark = (time.monotonic(), *self._mark[1:])  # speeds are training's alone
        if not self.is_terminal:
            self._print_line(trainer)
        super().on_validation_end(trainer, pl_module)

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        frames_per_s, updates_per_s = self._speed
        progress = datamodule_of(trainer).progress
        metrics: dict[str, Any] = {"frames/s": f"{frames_per_s:.0f}", "updates/s": f"{updates_per_s:.0f}"}
        if self._return is not None:
            metrics = {"return": f"{self._return:.1f}", **metrics}
        return {**metrics, "left": self._time_left(trainer, progress.frames)}

    def _measure(self, trainer: Trainer) -> None:
        progress = datamodule_of(trainer).progress
        now = (time.monotonic(), progress.frames, progress.updates)
        if self._mark[2] == 0:  # frames before the first update take no time: they would promise too little
            self._start = self._mark
        seconds = max(now[0] - self._mark[0], 1e-9)
        self._speed = ((now[1] - self._mark[1]) / seconds, (now[2] - self._mark[2]) / seconds)
        self._mark = now

    def _time_left(self, trainer: Trainer, frames: int) -> str:
        left = datamodule_of(trainer).total_frames - frames
        done = frames - self._start[1]
        seconds = round(left * (time.monotonic() - self._start[0]) / done) if done else 0
        return f"{seconds // 3600}:{seconds % 3600 // 60:02}:{seconds % 60:02}"

    def _print_line(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        frames = datamodule_of(trainer).progress.frames
        total = datamodule_of(trainer).total_frames
        metrics = self.get_metrics(trainer, trainer.lightning_module)
        values = " ".join(f"{key} {value}" for key, value in metrics.items())
        tell(f"frames {frames}/{total} {values}")
