"""Ctrl-C and SIGTERM: write a checkpoint, then stop."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from qsm_lightning.callbacks.checkpoint import RunCheckpoint
from qsm_lightning.errors import Interrupted


class CheckpointOnSignal(Callback):
    """On SIGINT or SIGTERM finish the batch or evaluation under way, write ``last.ckpt`` and raise ``Interrupted``.

    A second SIGINT stops at once, without a checkpoint. Outside the main thread signals are left alone. Without a
    :class:`~qsm_lightning.callbacks.RunCheckpoint` in the trainer nothing is written.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise Interrupted(signum, None)
        self._signum = signum
        print("\nstopping after the batch or evaluation under way; Ctrl-C again to stop at once", file=sys.stderr)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._install()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()  # Lightning has put its own handler of SIGTERM in front

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._note)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_asked(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._signum is not None:
            writer = next((cb for cb in trainer.checkpoint_callbacks if isinstance(cb, RunCheckpoint)), None)
            raise Interrupted(self._signum, str(writer.save(trainer)) if writer else None)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
