"""What ``qsm-fit`` saved, as a module again: for every command that takes a RUN_OR_CHECKPOINT."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from qsm_lightning import checkpoints, runs, trust
from qsm_lightning.checkpoints import Checkpoint
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.envs import make_env
from qsm_lightning.errors import SettingError, one_line, require
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.policy import check_samples
from qsm_lightning.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A checkpoint's networks and what they were trained on.

    Args:
        path: the state's file.
        module: with the weights of the checkpoint; :meth:`OffPolicyModule.averaged_weights` has those to act with.
        data: the settings under ``data``.
        frames: frames trained for.
    """

    path: Path
    module: OffPolicyModule
    data: dict[str, Any]
    frames: int

    @property
    def env(self) -> str:
        """The environment's name."""
        return self.data["env"]

    def make_env(self, num_envs: int = 1) -> EnvBase:
        """The environment, in ``num_envs`` copies.

        Raises:
            SettingError: when it cannot be made, or is of other widths than when the policy was trained.
        """
        env = make_env(self.env, num_envs)
        for key, spec in (("observation", env.observation_spec["observation"]), ("action", env.action_spec)):
            width, trained = spec.shape[-1], self.module.hparams[f"{key}_dim"]
            require(
                width == trained,
                f"{self.name} was trained with an {key} of {trained} numbers, and that of {self.env} has {width}: "
                "choose another checkpoint, or the environment as it was",
            )
        return env

    @property
    def name(self) -> str:
        """The checkpoint's folder, or file."""
        return str(self.path.parent if self.path.name == checkpoints.STATE else self.path)

    def policy(self, selector: str = "sample", candidates: int = 32) -> TensorDictModuleBase:
        """The policy without exploration noise, with the options of :func:`add_selector`.

        Raises:
            SettingError: when the algorithm does not have it.
        """
        check_samples(candidates, "--candidates")
        loss = self.module.loss
        loss.check_selector(selector, "--selector")
        return loss.evaluation_policy(selector, candidates)


def add_checkpoint(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options of :func:`load`: ``checkpoint``, a list of them for ``several``, and ``trust``."""
    parser.add_argument(
        "checkpoint",
        metavar="RUN_OR_CHECKPOINT",
        nargs="+" if several else None,
        help="a run's folder (its best checkpoint), or a checkpoint's",
    )
    parser.add_argument(
        "--trust", action="store_true", help="also load settings that name code outside of the packages trusted"
    )


def add_selector(parser: argparse.ArgumentParser) -> None:
    """Add the options of :meth:`Trained.policy`: ``selector`` and ``candidates``."""
    parser.add_argument(
        "--selector",
        choices=("sample", "best_of_n"),
        default="sample",
        help="one sample a step, or the best of n by Q",
    )
    parser.add_argument("--candidates", type=int, default=32, help="n of best_of_n (32)")


def load(run_or_checkpoint: str, trusted: bool = False) -> Trained:
    """The networks of a run's best checkpoint, or of the one named.

    Args:
        run_or_checkpoint: as for :func:`find`.
        trusted: whether settings may name code outside of the packages trusted.

    Raises:
        SettingError: when there is none, it is damaged, not trusted, or not written by ``qsm-fit``.
    """
    path = find(run_or_checkpoint)
    state = checkpoints.load(path)
    if not trusted:
        trust.check_state(state, path)
    try:
        module = OffPolicyModule(**state["hyper_parameters"])
        weights = state["state_dict"]
        module.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
        module.load_state_dict(weights)
        data = dict(state["datamodule_hyper_parameters"])
        frames = Progress(**state[OffPolicyDataModule.__qualname__]["progress"]).frames
    except (TypeError, KeyError, RuntimeError, AttributeError, StopIteration) as error:
        what = one_line(error)
        raise SettingError(f"{path} has settings that qsm-fit does not write ({what}); choose another") from error
    return Trained(path, module, data, frames)


def find(run_or_checkpoint: str) -> Path:
    """The state file of a checkpoint's folder, or of a run's best (or else last) whole checkpoint, or a file itself.

    Raises:
        SettingError: when there is none, or the one named is damaged.
    """
    path = Path(run_or_checkpoint)
    if path.is_file() and path.name != checkpoints.STATE:
        return path
    folder = path.parent if path.is_file() else path
    if (folder / checkpoints.MANIFEST).exists():
        candidates = [Checkpoint(folder)]
    else:
        folder = folder / runs.CHECKPOINTS if (folder / runs.CHECKPOINTS).is_dir() else folder
        found = [checkpoints.best(folder), *reversed(checkpoints.complete(folder))]
        candidates = list(dict.fromkeys(checkpoint for checkpoint in found if checkpoint is not None))
    require(candidates, f"{run_or_checkpoint!r} is neither a checkpoint nor the folder of a run that has one")
    whole, faults = checkpoints.first_whole(candidates, replay=False)
    if whole is None:
        raise SettingError(f"{faults[0]}: choose another checkpoint")
    for fault in faults:
        log.warning("%s; using %s instead", fault, whole.path)
    return whole.state
