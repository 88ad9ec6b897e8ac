"""``qsm-eval``: evaluate what ``qsm-fit`` saved, with no setting repeated."""

from __future__ import annotations

import argparse
import json
from typing import NoReturn

from qsm_lightning import checkpoints
from qsm_lightning.collect import Progress
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.envs import make_env
from qsm_lightning.errors import SettingError, require
from qsm_lightning.evaluation import run_episodes, summary
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.recording import check_renderable, check_video_path, record_episode, write_video
from qsm_lightning.seeding import Purpose, derive_seed


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
    return parser


def run(args: list[str] | None = None) -> None:
    """Parse, evaluate and print."""
    options = _parser().parse_args(args)
    require(options.episodes > 0, f"--episodes is {options.episodes}: it must be greater than 0")
    require(options.candidates > 0, f"--candidates is {options.candidates}: it must be greater than 0")
    require(options.seed >= 0, f"--seed is {options.seed}: it must not be negative")
    if options.video:
        check_video_path(options.video)
    path = checkpoints.find(options.checkpoint)
    checkpoint = checkpoints.load(path)
    name = checkpoint["datamodule_hyper_parameters"]["env"]
    if options.video:
        check_renderable(name)
    module = OffPolicyModule(**checkpoint["hyper_parameters"])
    module.load_state_dict(checkpoint["state_dict"])
    policy = module.loss.evaluation_policy(options.selector, options.candidates)
    env_seed = derive_seed(options.seed, 0, Purpose.REPORT_ENV)
    noise_seed = derive_seed(options.seed, 0, Purpose.REPORT_NOISE)
    env = make_env(name, options.episodes)
    result = {
        "checkpoint": str(path),
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
