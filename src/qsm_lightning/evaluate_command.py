"""``qsm-eval``: evaluate what ``qsm-fit`` saved, with no setting repeated."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import NoReturn

from qsm_lightning import checkpoints, runs, trust
from qsm_lightning.checkpoints import Checkpoint
from qsm_lightning.collect import Progress
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.envs import make_env
from qsm_lightning.errors import SettingError, require
from qsm_lightning.evaluation import run_episodes, summary
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.recording import check_renderable, check_video_path, record_episode, write_video
from qsm_lightning.seeding import Purpose, derive_seed

log = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}; see qsm-eval --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("qsm-eval", description="Evaluate a trained policy.")
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its best checkpoint) or a .ckpt"
    )
    parser.add_argument("--episodes", type=int, default=10, help="number of whole episodes (10)")
    parser.add_argument(
        "--selector",
        choices=("sample", "best_of_n"),
        default="sample",
        help="one sample a step, or the best of n by Q",
    )
    parser.add_argument("--candidates", type=int, default=32, help="n of best_of_n (32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and noise, which training never used (0)")
    parser.add_argument("--video", metavar="FILE", help="also record one episode to a .mp4 or .gif")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--trust", action="store_true", help="also load settings that name code outside of the packages trusted"
    )
    return parser


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
    faults = []
    for checkpoint in candidates:
        try:
            checkpoint.verify(replay=False)
        except checkpoints.DamagedError as fault:
            faults.append(str(fault))
        else:
            for sentence in faults:
                log.warning("%s; evaluating %s instead", sentence, checkpoint.path)
            return checkpoint.state
    raise SettingError(
        f"{faults[0]}: choose another checkpoint"
        if faults
        else f"{run_or_checkpoint!r} is neither a checkpoint nor the folder of a run that has one"
    )


def run(args: list[str] | None = None) -> None:
    """Parse, evaluate and print."""
    options = _parser().parse_args(args)
    require(options.episodes > 0, f"--episodes is {options.episodes}: it must be greater than 0")
    require(options.candidates > 0, f"--candidates is {options.candidates}: it must be greater than 0")
    require(options.seed >= 0, f"--seed is {options.seed}: it must not be negative")
    if options.video:
        check_video_path(options.video)
    path = find(options.checkpoint)
    checkpoint = checkpoints.load(path)
    if not options.trust:
        trust.check_state(checkpoint, path)
    name = checkpoint["datamodule_hyper_parameters"]["env"]
    if options.video:
        check_renderable(name)
    try:
        module = OffPolicyModule(**checkpoint["hyper_parameters"])
        weights = checkpoint["state_dict"]
        module.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
        module.load_state_dict(weights)
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise SettingError(f"{path} has settings that qsm-fit does not write ({what}); choose another") from error
    require(
        options.selector in module.loss.selectors,
        f"--selector is {options.selector}: {type(module.loss).__name__} has {' and '.join(module.loss.selectors)}",
    )
    policy = module.loss.evaluation_policy(options.selector, options.candidates)
    env_seed = derive_seed(options.seed, 0, Purpose.REPORT_ENV)
    noise_seed = derive_seed(options.seed, 0, Purpose.REPORT_NOISE)
    env = make_env(name, options.episodes)
    with module.averaged_weights():
        result = {
            "checkpoint": str(path.parent if path.name == checkpoints.STATE else path),
            "env": name,
            "frames": Progress(**checkpoint[OffPolicyDataModule.__qualname__]["progress"]).frames,
            "selector": options.selector,
            **summary(run_episodes(env, policy, env_seed, noise_seed)),
        }
        env.close()
        if options.video:
            frames, result["video_return"] = record_episode(name, policy, env_seed, noise_seed)
            write_video(options.video, frames)
            result["video"] = options.video
    if options.json:
        print(json.dumps(result))
    else:
        print(
            "\n".join(
                f"{key}: {f'{value:.2f}' if isinstance(value, float) else value}" for key, value in result.items()
            )
        )
