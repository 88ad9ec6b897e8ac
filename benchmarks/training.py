"""Training from Python, for measurements and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer


def quiet_trainer(folder: str | Path, **settings: Any) -> Trainer:
    """A Trainer that counts by frames as ``qsm-fit`` has it, and prints, logs and saves nothing.

    Args:
        folder: its default_root_dir.
        **settings: the Trainer's, over these.
    """
    quiet = {
        **{"max_epochs": -1, "num_sanity_val_steps": 0, "inference_mode": False, "enable_model_summary": False},
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
    }
    return Trainer(**{**quiet, "default_root_dir": folder, **settings})
