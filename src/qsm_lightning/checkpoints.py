"""Run folders and checkpoints: where they are, whether they can be used, and what is said about them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import SettingError, require
from qsm_lightning.module import OffPolicyModule


def check_writable(folder: Path) -> None:
    """Raise :class:`SettingError` unless ``folder`` exists or can be made, and can be written; makes nothing."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    require(
        existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        f"trainer.default_root_dir is {str(folder)!r}: {existing} is not a folder that can be written; choose another",
    )


def newest(root: Path, pattern: str) -> Path | None:
    """The file below ``root`` matching the glob ``pattern`` that was written last."""
    return max(root.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def resolve(ckpt_path: str | None, run: Path) -> Path | None:
    """The checkpoint that ``--ckpt_path`` names: a file, or ``last`` for the newest below ``run``'s sibling folders.

    Raises:
        SettingError: when there is none.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        path = newest(run.parent, "*/checkpoints/last.ckpt")
        if path is None:
            raise SettingError(
                f"--ckpt_path is last: there is no checkpoint below {run.parent}; give a file, or leave it"
            )
        return path
    require(Path(ckpt_path).is_file(), f"--ckpt_path is {ckpt_path!r}: there is no such file")
    return Path(ckpt_path)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, loaded with ``weights_only=True``: opening one runs no code.

    Raises:
        SettingError: when it is not a checkpoint of this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise SettingError(
            f"{path} is not a checkpoint, or a damaged one ({type(error).__name__}); choose another"
        ) from error
    keys = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", OffPolicyDataModule.__qualname__}
    require(
        isinstance(checkpoint, dict) and keys <= checkpoint.keys(),
        f"{path} is not a checkpoint of qsm-fit; choose one from a run's checkpoints folder",
    )
    return checkpoint


def check_resumable(path: Path, module: OffPolicyModule, data: OffPolicyDataModule) -> None:
    """Raise :class:`SettingError` unless training can go on from ``path`` with these settings."""
    checkpoint = load(path)
    env = checkpoint["datamodule_hyper_parameters"]["env"]
    theirs = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    for name, value in module.state_dict().items():
        require(
            theirs.get(name) == value.shape,
            f"{path} is of {env} with other shapes ({name} is {_shape(theirs.get(name))}, here {_shape(value.shape)}): "
            f"resume with the settings of its run, or choose a checkpoint of {data.env_name}",
        )
    require(
        theirs.keys() == module.state_dict().keys(),
        f"{path} is of another algorithm: choose one of this model.loss",
    )
    frames = checkpoint[OffPolicyDataModule.__qualname__]["progress"]["frames"]
    require(
        frames < data.total_frames,
        f"data.total_frames is {data.total_frames}: {path} is already at {frames} frames; give a greater number",
    )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))


def find(run_or_checkpoint: str) -> Path:
    """A checkpoint file from its path or its run's folder: there the best, or else the last.

    Raises:
        SettingError: when there is none.
    """
    path = Path(run_or_checkpoint)
    if path.is_file():
        return path
    for name in ("best", "last"):
        for candidate in (path / "checkpoints" / f"{name}.ckpt", path / f"{name}.ckpt"):
            if candidate.is_file():
                return candidate
    raise SettingError(f"{run_or_checkpoint!r} is neither a checkpoint nor the folder of a run that has one")


def run_folder(trainer: Trainer) -> Path:
    """The run's folder: the first logger's. Unlike ``trainer.log_dir`` it can be asked for on one rank alone."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return Path(next(filter(None, folders), trainer.default_root_dir))


def resume_command(checkpoint: Path) -> str:
    """The command that goes on from a checkpoint of a run's folder."""
    config = checkpoint.parent.parent / "config.yaml"
    return shlex.join(["qsm-fit", "--config", str(config), "--ckpt_path", str(checkpoint)])
