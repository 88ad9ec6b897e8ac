"""Ctrl-C and SIGTERM: write a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from qsm_lightning import checkpoints
from qsm_lightning.errors import Interrupted


class CheckpointOnSignal(Callback):
    """On SIGINT or SIGTERM finish the batch under way, write ``checkpoints/last.ckpt`` and raise ``Interrupted``.

    A second SIGINT stops at once, without a checkpoint. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signum = signum

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._signum is not None:
            path = checkpoints.folder(trainer) / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            raise Interrupted(self._signum, str(path))

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
