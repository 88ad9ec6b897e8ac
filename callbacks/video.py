"""An evaluation episode as a picture strip in TensorBoard, and as a .gif beside the checkpoints. Off by default."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from typing_extensions import override

from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.errors import Interrupted, require_positive
from qsm_lightning.recording import check_renderable, picture_strip, record_episode, write_video
from qsm_lightning.runs import run_folder
from qsm_lightning.seeding import check_seed


class EvaluationVideo(Callback):
    """Render one episode of the evaluation policy after evaluations.

    Switch it on with ``--trainer.callbacks+=qsm_lightning.callbacks.EvaluationVideo``. Without a display MuJoCo needs
    ``MUJOCO_GL=egl`` or ``osmesa``; that rendering works is checked before training starts.

    Args:
        every_evaluations: evaluations between two episodes.
        max_frames: frames of the episode that are rendered at most.
        seed: seed of the episode's start and noise.

    Raises:
        SettingError: when rendering does not work here.
    """

    def __init__(self, every_evaluations: int = 1, max_frames: int = 1_000, seed: int = 0) -> None:
        require_positive(every_evaluations=every_evaluations, max_frames=max_frames)
        check_seed(seed, "seed")
        self.every_evaluations = every_evaluations
        self.max_frames = max_frames
        self.seed = seed
        self._count = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_renderable(datamodule_of(trainer).env_name)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._count += 1
        if self._count % self.every_evaluations or not trainer.is_global_zero:
            return
        data = datamodule_of(trainer)
        policy = pl_module.loss.evaluation_policy()  # type: ignore[union-attr, operator]
        episode = (data.env_name, policy, self.seed, self.seed, self.max_frames)
        record = partial(record_episode, *episode, every=4, each_step=data.stopping.leave)
        try:
            with pl_module.averaged_weights():  # type: ignore[operator]
                frames, _ = data.surviving(record, lambda: None)
        except Interrupted:  # all processes stop together, once this evaluation's checkpoint is written
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with contextlib.suppress(OSError):  # a full disk costs a picture
                    strip = picture_strip(frames)
                    logger.experiment.add_image("episode", strip, data.progress.frames, dataformats="HWC")
        path = run_folder(trainer) / "videos" / f"{data.progress.frames:09}.gif"
        with contextlib.suppress(OSError):
            write_video(str(path), frames[:, ::2, ::2], fps=15)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count = state_dict["count"]
