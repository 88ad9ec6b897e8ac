"""The checkpoints of a run: after every evaluation, and whenever a run is stopped."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from typing_extensions import override

from qsm_lightning import checkpoints, durable
from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import EnvironmentFault, Interrupted, SettingError, require_positive
from qsm_lightning.losses.base import non_finite
from qsm_lightning.runs import CHECKPOINTS, begun_at

RETRY_SECONDS = 60.0


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/<frame>`` after every evaluation, keeps the newest and the best, goes on where one ended.

    A checkpoint is complete or absent (:mod:`qsm_lightning.checkpoints`). Replay frames are written once, into files
    that checkpoints share. Frames are the clock (``ModelCheckpoint`` goes by ``global_step``, and would leave out
    evaluations before the first update). When the disk is full the run goes on, and a later attempt is made. When a
    signal or a failed environment ends the run, its state is written first.

    Args:
        every_frames: also at every multiple of so many frames; null for evaluations alone.
        keep_last: newest checkpoints to keep; the one with the best evaluation return stays too.
    """

    def __init__(self, every_frames: int | None = None, keep_last: int = 2) -> None:
        require_positive("checkpoint.", every_frames=every_frames, keep_last=keep_last)
        self.every_frames = every_frames
        self.keep_last = keep_last
        self.best_return: float | None = None
        self.saved_at_frames = 0
        self.last: checkpoints.Checkpoint | None = None
        self._training = False
        self._retry_at: float | None = None

    @property
    def best(self) -> checkpoints.Checkpoint | None:
        """The kept checkpoint with the highest evaluation return."""
        return checkpoints.best(self.last.path.parent) if self.last else None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.every_frames is not None:
            datamodule_of(trainer).end_batches_every(self.every_frames)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            self._check_state(callback)
            if isinstance(callback, EarlyStopping):  # else it counts an evaluation after it was saved
                callback._check_on_train_epoch_end = False

    @staticmethod
    def _check_state(callback: Callback) -> None:
        """Refuse a callback whose state a checkpoint could not be read with again."""
        try:
            durable.unpacked(durable.packed(callback.state_dict()))
        except (PicklingError, UnpicklingError, TypeError) as error:
            raise SettingError(
                f"trainer.callbacks: the state of {type(callback).__name__} is not plain data, and checkpoints with it "
                "could not be opened; have its state_dict give numbers, strings, tensors, lists and dictionaries"
            ) from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        self.saved_at_frames = datamodule_of(trainer).progress.frames
        self.last = begun_at(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = datamodule_of(trainer)
        frames, every = data.progress.frames, self.every_frames
        due = every is not None and frames // every > self.saved_at_frames // every and not data.evaluation_owed
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            data.stopping.save_wanted = True  # clocks differ: the ranks agree on it in the next batch
        if due or data.stopping.save_agreed:
            self.save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = trainer.callback_metrics["eval/return"].item()
        self.best_return = score if self.best_return is None else max(score, self.best_return)
        self.save(trainer, score)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ended without an evaluation still leaves its state."""
        frames = datamodule_of(trainer).progress.frames
        if (frames != self.saved_at_frames or self._retry_at is not None) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The learner's state is sound when a signal or an environment ended the run: write it, unless it diverged."""
        data = datamodule_of(trainer)
        if not isinstance(exception, (Interrupted, EnvironmentFault)) or getattr(exception, "at_once", False):
            return
        if not (exception.agreed or data.ranks.count == 1) or not self._training or not data.started:
            return
        found = non_finite(pl_module.metrics)  # type: ignore[arg-type]
        if any(data.ranks.highest(found is not None)):
            warnings.warn(f"no checkpoint is written: training diverged ({found or 'on another rank'})", stacklevel=2)
            return
        self.save(trainer)

    def save(self, trainer: Trainer, eval_return: float | None = None) -> None:
        """Write a checkpoint, and remove those that are not kept; on a full disk, warn and try again later."""
        datamodule_of(trainer).stopping.saved()
        try:
            self._save(trainer, eval_return)
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not trainer.is_global_zero:
                return
            kept = f"the last one is {self.last.path}" if self.last else "there is none yet"
            warnings.warn(f"no checkpoint could be written ({error}): {kept}; trying again later", stacklevel=2)

    def _save(self, trainer: Trainer, eval_return: float | None) -> None:
        data = datamodule_of(trainer)
        folder = self._folder(trainer)
        replay = data.save_replay(folder / checkpoints.REPLAY)
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # all ranks give theirs
        # The others wait here: they learn how it went, and write no file that is not listed while old ones are removed.
        data.ranks.attempt(lambda: self._publish(trainer, folder, state, eval_return, replay))
        self.saved_at_frames, self._retry_at = data.progress.frames, None

    def _publish(
        self, trainer: Trainer, folder: Path, state: dict[str, Any], eval_return: float | None, replay: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        with checkpoints.staging(folder) as stage:
            trainer.strategy.save_checkpoint(state, stage / checkpoints.STATE)
            self._flush_curves(trainer)  # no curve ends before a checkpoint of its run
            self.last = checkpoints.publish(stage, datamodule_of(trainer).progress.frames, eval_return, replay)
        with contextlib.suppress(OSError):  # the next save tries again
            checkpoints.thin_out(folder, self.keep_last)

    def _flush_curves(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            with contextlib.suppress(OSError):
                if callable(flush := getattr(getattr(logger, "experiment", None), "flush", None)):
                    flush()

    def _folder(self, trainer: Trainer) -> Path:
        """A resumed run goes on in the folder of the checkpoint it came from."""
        if checkpoint := begun_at(trainer):
            return checkpoint.path.parent
        return datamodule_of(trainer).run / CHECKPOINTS

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_return": self.best_return}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_return = state_dict["best_return"]
