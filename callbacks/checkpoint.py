"""Which checkpoints a run keeps: the last, and the best by evaluation return, both written at evaluations."""

from __future__ import annotations

from pytorch_lightning.callbacks import ModelCheckpoint


def last_checkpoint() -> ModelCheckpoint:
    """``checkpoints/last.ckpt``, replaced at every evaluation."""
    return ModelCheckpoint(filename="last", save_on_train_epoch_end=False, enable_version_counter=False)


def best_checkpoint() -> ModelCheckpoint:
    """``checkpoints/best.ckpt``, of the highest evaluation return so far."""
    return ModelCheckpoint(
        filename="best",
        monitor="eval/return",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
