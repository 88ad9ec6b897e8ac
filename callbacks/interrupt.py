"""Ctrl-C, SIGTERM and SIGUSR1: stop with a checkpoint, or write one and go on."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from qsm_lightning.datamodule import OffPolicyDataModule, datamodule_of
from qsm_lightning.errors import Interrupted, tell


class StopOnSignal(Callback):
    """SIGINT and SIGTERM stop the run after the update, evaluation step or chunk of frames under way.

    :class:`~qsm_lightning.errors.Interrupted` is raised there, and :class:`~qsm_lightning.callbacks.RunCheckpoint`
    writes the run's state, from which it goes on exactly. A second SIGINT stops at once, without a checkpoint. SIGUSR1
    writes a checkpoint after the batch under way. With several ranks a signal to one of them is enough: they agree on
    where to stop. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self._data: OffPolicyDataModule | None = None
        self._before: dict[int, Any] = {}

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        assert self._data is not None
        if self._data.stopping.signal is not None and signum == signal.SIGINT:
            raise Interrupted(signum, at_once=True)
        self._data.stopping.signal = signum
        again = "; Ctrl-C again to stop at once" if signum == signal.SIGINT else ""
        if self._data.ranks.rank == 0:
            tell(f"\nstopping with a checkpoint{again}", sys.stderr)

    def _save(self, signum: int, frame: FrameType | None) -> None:
        assert self._data is not None
        self._data.stopping.save_wanted = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._data = datamodule_of(trainer)
        if stage == "fit":
            self._install()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()  # Lightning has put its own handler of SIGTERM in front

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop, signal.SIGUSR1: self._save}
            for signum, handler in handlers.items():
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, handler)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
